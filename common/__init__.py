"""What every script shares, one subject per module, and nothing about RLHF.

config: the command line and its errors. runtime: device, precision, ranks. learner: optimizer steps and schedules. run: a
run's folder, checkpoints, resuming. files: atomic files. seeds: random numbers. download, gpt2: published weights. onednn:
matrix products on a CPU. plan: what a model size needs.
"""
