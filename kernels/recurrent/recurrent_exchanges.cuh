// How the blocks of a persistent team meet: in one block, a cluster or a grid. An exchange holds the sources
// of a step and brings each block's slice of the next ones to the whole team.
//
//   begin()                all blocks of the team are there
//   own(parity, seat)      where the block puts its slice of the sources of that parity
//   publish(parity)        gives the slices of all seats to the team; the block's threads call it together
//   wait()                 until all of the team have published
//   stage(parity, first)   where `stages`: brings sources from seat `first` on to shared memory
//   source(parity, seat)   where a tile's sources lie in shared memory, the next ones team.stride further
//   defers                 whether stores for later calls are better issued between publish() and wait()
//
// Parities take turns. Whoever writes the sources of a parity has waited since everybody's last look at what
// lay there: a step reads one parity and writes the other, and is over when the next wait() returns.
#pragma once
#include "recurrent/recurrent_persistent.cuh"

namespace pyseqnet {

// Sources in shared memory, (2, sequences, stride); who finishes a unit writes them in place.
template <class T>
struct BlockExchange {
  struct Memory {};
  static constexpr bool stages = false, defers = false, needs_sm90 = false;
  const Team& team;
  T* sources;

  PYSEQNET_DEVICE BlockExchange(const Team& team, const Memory&, unsigned char* shared)
      : team(team), sources(reinterpret_cast<T*>(shared + team.sources)) {}
  PYSEQNET_DEVICE T* own(int parity, int seat) const {
    return sources + (parity * team.sequences + seat) * team.stride;
  }
  PYSEQNET_DEVICE const T* source(int parity, int seat) const { return own(parity, seat); }
  PYSEQNET_DEVICE void begin() const {}
  PYSEQNET_DEVICE void publish(int) const {}
  PYSEQNET_DEVICE void wait() const { __syncthreads(); }
  PYSEQNET_DEVICE void stage(int, int) const {}
};

// Sources of all units in every block's shared memory, (2, sequences, stride). A slice is copied into the
// neighbours' memory, and the barrier of the cluster makes it visible. After the last wait() nobody writes to
// a neighbour any more, so a block may leave.
template <class T>
struct ClusterExchange {
  struct Memory {};
  static constexpr bool stages = false, defers = true, needs_sm90 = true;
  const Team& team;
  T* sources;
  int rank;

  PYSEQNET_DEVICE ClusterExchange(const Team& team, const Memory&, unsigned char* shared)
      : team(team),
        sources(reinterpret_cast<T*>(shared + team.sources)),
        rank(int(blockIdx.x) % team.blocks) {}
  PYSEQNET_DEVICE const T* source(int parity, int seat) const {
    return sources + (parity * team.sequences + seat) * team.stride;
  }
  PYSEQNET_DEVICE T* own(int parity, int seat) const {
    return sources + (parity * team.sequences + seat) * team.stride + rank * team.width;
  }
  // The neighbours have begun, and cleared their memory.
  PYSEQNET_DEVICE void begin() const { ptx::cluster_sync(); }

  PYSEQNET_DEVICE void publish(int parity) const {
    __syncthreads();
    copy(parity);
    ptx::cluster_arrive();
  }
  PYSEQNET_DEVICE void copy(int parity) const {
    const int vectors = team.width / vector_elements, of_slice = team.sequences * vectors;
#pragma unroll 1
    for (int i = int(threadIdx.x); i < of_slice * (team.blocks - 1); i += int(blockDim.x)) {
      const int neighbour = i / of_slice, seat = i % of_slice / vectors, at = i % vectors * vector_elements;
      Vector16* const place = reinterpret_cast<Vector16*>(own(parity, seat) + at);
      *ptx::map_shared_rank(place, unsigned(neighbour + (neighbour >= rank))) = *place;
    }
  }
  PYSEQNET_DEVICE void wait() const { ptx::cluster_wait(); }
  PYSEQNET_DEVICE void stage(int, int) const {}
};

// Sources in global memory, (D, teams, 2, sequences, blocks * width), which stay in the L2 cache; a counter
// of each team only grows. A block collects its slice in shared memory, to write and read 16 bytes at a time.
template <class T>
struct GridExchange {
  struct Memory {
    T* sources;         // (D, teams, 2, sequences, blocks * width)
    unsigned* arrived;  // (D, teams)
  };
  static constexpr bool stages = true, defers = true, needs_sm90 = false;

  // Pointers are made where they are needed: registers are what the weights take.
  const Team& team;
  const Memory& memory;
  unsigned char* shared;
  unsigned epoch = 0;
  int rank, own_team;

  PYSEQNET_DEVICE GridExchange(const Team& team, const Memory& memory, unsigned char* shared)
      : team(team), memory(memory), shared(shared), rank(int(blockIdx.x) % team.blocks) {
    own_team = (team.first_direction + int(blockIdx.y)) * team.teams + int(blockIdx.x) / team.blocks +
               team.first_team;
  }
  PYSEQNET_DEVICE T* staged() const { return reinterpret_cast<T*>(shared + team.sources); }
  PYSEQNET_DEVICE T* slice() const { return reinterpret_cast<T*>(shared + team.own); }
  PYSEQNET_DEVICE T* sources(int parity, int seat) const {
    return memory.sources + ((int64_t(own_team) * 2 + parity) * team.sequences + seat) * row();
  }
  PYSEQNET_DEVICE int64_t row() const { return int64_t(team.blocks) * team.width; }
  PYSEQNET_DEVICE T* own(int, int seat) const { return slice() + seat * team.width; }
  PYSEQNET_DEVICE const T* source(int, int seat) const { return staged() + seat % team.staged * team.stride; }
  PYSEQNET_DEVICE void begin() const {}

  PYSEQNET_DEVICE void publish(int parity) const {
    __syncthreads();
    copy(parity);
    __syncthreads();
    arrive();
  }
  PYSEQNET_DEVICE void copy(int parity) const {
    const int vectors = team.width / vector_elements;
#pragma unroll 1
    for (int i = int(threadIdx.x); i < team.sequences * vectors; i += int(blockDim.x)) {
      const int seat = i / vectors, at = i % vectors * vector_elements;
      *reinterpret_cast<Vector16*>(sources(parity, seat) + rank * team.width + at) =
          *reinterpret_cast<const Vector16*>(slice() + seat * team.width + at);
    }
  }
  PYSEQNET_DEVICE void arrive() const {
    if (threadIdx.x != 0) return;
    __threadfence();
    ptx::red_release_add(memory.arrived + own_team, 1u);
  }
  PYSEQNET_DEVICE void wait() {
    wait_for(++epoch);
    __syncthreads();
  }
  PYSEQNET_DEVICE void wait_for(unsigned times) const {
    if (threadIdx.x != 0) return;
    while (ptx::ld_acquire(memory.arrived + own_team) < times * unsigned(team.blocks)) {
    }
    __threadfence();
  }
  // The sources of the tiles from `first` on, as many as there is room for.
  PYSEQNET_DEVICE void stage(int parity, int first) const {
    if (first > 0) __syncthreads();  // all are done with those before
    const int vectors = int(row()) / vector_elements;
    const int count = first + team.staged < team.sequences ? team.staged : team.sequences - first;
#pragma unroll 1
    for (int i = int(threadIdx.x); i < count * vectors; i += int(blockDim.x)) {
      const int seat = i / vectors, at = i % vectors * vector_elements;
      ptx::cp_async_16(ptx::smem_u32(staged() + seat * team.stride + at), sources(parity, first + seat) + at);
    }
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    __syncthreads();
  }
};

}  // namespace pyseqnet
