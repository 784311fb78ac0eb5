"""The main job on real data: train a small convolutional network on handwritten digits and report.

    python -m pyseqnet.demo --out demo_report

Nothing is downloaded: scikit-learn ships the digits. Needs the extra "demo".
"""
