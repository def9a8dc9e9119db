"""What every script shares, one subject per module, and nothing about RLHF.

config: the command line and its errors. devices: device and precision. processes: how they find each other. runtime: ranks and
placed models. learner: optimizer steps and schedules. run: a run's folder, resuming. checkpoints: their formats, and models from
them. files: atomic files. seeds: random numbers. download, gpt2: published weights. plan: what a model size needs. For speed and
memory only: sharding, layers, decoding (sampling on a GPU), onednn (sampling on a CPU).
"""
