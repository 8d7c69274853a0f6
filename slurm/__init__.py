if __name__ != "isobatch.slurm":
    raise ImportError(f"{__name__} is a part of Isobatch: import isobatch.slurm")
