"""Positions of Go on small boards, from games of random moves: which move takes the most stones?

The rules are those of stones and liberties: a group without an empty neighbour is taken off, and suicide is not
allowed. There is no ko rule and no passing; a game stops after some moves.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

SIZE = 9
HISTORY = 16  # positions that a player is shown, the newest first, three planes each: own, other, empty
PLANES = 3 * HISTORY
FEWEST, MOST = 20, 60  # moves of a game before its position is looked at
Board = list[int]  # 0 empty, 1 and -1 the players, row by row


def neighbours(size: int) -> list[list[int]]:
    """The points beside each point."""
    found = []
    for row in range(size):
        for column in range(size):
            beside = ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1))
            found.append([r * size + c for r, c in beside if 0 <= r < size and 0 <= c < size])
    return found


def group(board: Board, point: int, beside: list[list[int]]) -> tuple[set[int], set[int]]:
    """The stones that hang together with the one at ``point``, and their liberties."""
    stones, liberties, open_ends = {point}, set(), [point]
    while open_ends:
        for other in beside[open_ends.pop()]:
            if board[other] == 0:
                liberties.add(other)
            elif board[other] == board[point] and other not in stones:
                stones.add(other)
                open_ends.append(other)
    return stones, liberties


def captures(board: Board, player: int, beside: list[list[int]]) -> dict[int, int]:
    """How many stones each capturing move of the player takes."""
    taken: dict[int, int] = {}
    seen: set[int] = set()
    for point, stone in enumerate(board):
        if stone == -player and point not in seen:
            stones, liberties = group(board, point, beside)
            seen |= stones
            if len(liberties) == 1:
                move = next(iter(liberties))
                taken[move] = taken.get(move, 0) + len(stones)
    return taken


def play(board: Board, move: int, player: int, beside: list[list[int]]) -> bool:
    """Puts a stone on an empty point and takes what has no liberty; False, and nothing done, for suicide."""
    board[move] = player
    dead: set[int] = set()
    for other in beside[move]:
        if board[other] == -player:
            stones, liberties = group(board, other, beside)
            if not liberties:
                dead |= stones
    if not dead and not group(board, move, beside)[1]:
        board[move] = 0
        return False
    for point in dead:
        board[point] = 0
    return True


class Positions(NamedTuple):
    """``planes`` (N, PLANES, size, size) float32 from the view of who is to move; ``moves`` (N,) row by row."""

    planes: Tensor
    moves: Tensor


def _planes(history: Iterable[Board], player: int, size: int) -> Tensor:
    boards = torch.tensor(list(history), dtype=torch.int8)
    return torch.stack([boards == player, boards == -player, boards == 0], 1).view(-1, size, size)


def positions(count: int, seed: int, size: int = SIZE) -> Positions:
    """Positions in which one move takes more stones than any other, each of a game of its own."""
    chance, beside = random.Random(seed), neighbours(size)
    planes = torch.empty(count, PLANES, size, size, dtype=torch.bool)
    moves = torch.empty(count, dtype=torch.int64)
    found = 0
    while found < count:
        board, player = [0] * (size * size), 1
        history = [board[:]] * HISTORY
        for _ in range(chance.randint(FEWEST, MOST)):
            empty = [point for point, stone in enumerate(board) if stone == 0]
            play(board, chance.choice(empty), player, beside)
            history = [board[:], *history[:-1]]
            player = -player
        taken = captures(board, player, beside)
        best = [move for move, stones in taken.items() if stones == max(taken.values())]
        if len(best) == 1:
            planes[found], moves[found] = _planes(history, player, size), best[0]
            found += 1
    return Positions(planes.float(), moves)
