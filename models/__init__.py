"""The GPT, assembled from parts that a config names; each part counts its own FLOPs. Knows kernels, never bench.

Nothing is imported here, so that `models.config`, which a command line reads, does not load torch.
"""
