"""Every Triton kernel in every way it is launched, and the fused head over it, on a few small rows.

    python tests/ops/sanitize.py [--device cpu]         # the CPU: in Triton's interpreter

is what `test_cross_entropy_triton.py` puts under NVIDIA's compute-sanitizer (racecheck, memcheck): the interpreter runs
one program after the other and sees no race, nor an access outside of a tensor. racecheck looks at shared memory only;
that a gradient may take its logits' place is a test of its own there.
"""

import argparse
import os
import sys
from pathlib import Path

VOCABULARIES = 1000, 4096, 16_384, 32_768, 65_536, 70_000  # every entry of the launch table, in bfloat16


def main(device: str) -> None:
    import torch
    from packsft_kernels import LossOptions, cross_entropy, linear_cross_entropy

    plain = LossOptions()
    every = LossOptions(
        softcap=5.0, logit_scale=0.7, label_smoothing=0.1, z_loss=1e-2, dft=True, entropy=True, correct=True
    )
    edges = (3, 20_001)  # rows that end, and begin, anywhere
    half, single = torch.bfloat16, torch.float32
    cases = [(vocab, half, plain) for vocab in (*edges, *VOCABULARIES)]
    cases += [(vocab, single, plain) for vocab in (4096, 20_001, 70_001)]
    cases += [(vocab, half, every) for vocab in (4096, 20_001, 70_001)]
    for vocab, dtype, options in cases:
        for inplace in (False, True):
            leaf = torch.randn(5, vocab, device=device, dtype=dtype, requires_grad=True)
            targets = torch.tensor([0, vocab - 1, -100, vocab // 2, 1], device=device)
            loss = cross_entropy(leaf.view_as(leaf), targets=targets, options=options, inplace=inplace).loss
            (loss / 2).backward()  # a factor that the kernel of `scale_` does not leave out

    # The head pads the rows of a chunk, and orders the scored ones. (At 1,000 columns cuBLAS takes a kernel that
    # racecheck cannot run: CUBLAS_STATUS_EXECUTION_FAILED on an H200, where memcheck finds nothing.)
    for vocab in (20_001, 70_001):
        hidden = torch.randn(9, 64, device=device, dtype=half, requires_grad=True)
        weight = torch.randn(vocab, 64, device=device, dtype=half, requires_grad=True)
        targets = torch.tensor([0, vocab - 1, -100, vocab // 2, 1], device=device)
        rows = torch.tensor([8, 0, 3, 4, 6], device=device)
        for reduction in ("mean", "none"):
            linear_cross_entropy(hidden, weight, targets, rows=rows, reduction=reduction).loss.sum().backward()
    if device == "cuda":
        torch.cuda.synchronize()
    print("every launch ran")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    arguments = parser.parse_args()
    if arguments.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    sys.path.insert(0, str(Path(__file__).parents[2] / "kernels"))
    main(arguments.device)
