"""The main job on real data: train three small models, report how well they do and how fast the kernels are.

    python -m pyseqnet.demo --out demo_report

A convolutional network reads handwritten digits, a bidirectional LSTM highlights Python source, and a Transformer
rewrites dates of sixteen locales in ISO 8601. Nothing is downloaded: scikit-learn ships the digits, the interpreter the
source, and Babel the forms of the dates. Needs the extra "demo".
"""
