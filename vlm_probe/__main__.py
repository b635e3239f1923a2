"""`python -m vlm_probe`, which `torchrun -m vlm_probe` starts."""

from vlm_probe.cli import main

if __name__ == "__main__":
    main()
