"""What every script shares, one subject per module, and nothing about RLHF.

config: the command line and its errors. devices: device, precision, the process group. runtime: ranks and placed models.
learner: optimizer steps and schedules. run: a run's folder, checkpoints, resuming. files: atomic files. seeds: random numbers.
download, gpt2: published weights. plan: what a model size needs. For speed and memory only: layers, decoding (sampling on a
GPU), onednn (sampling on a CPU).
"""
