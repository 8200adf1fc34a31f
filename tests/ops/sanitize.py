"""Every way to launch the cross-entropy kernel once, over a few small rows: for NVIDIA's compute-sanitizer.

    compute-sanitizer --tool racecheck --error-exitcode 1 python tests/ops/sanitize.py      (or memcheck)

The interpreter runs one program after the other: it sees no race, nor an access outside of a tensor. racecheck looks at
shared memory only; that a gradient may take its logits' place is for `test_cross_entropy_triton.py`. For memcheck, set
PYTORCH_NO_CUDA_MEMORY_CACHING=1, or it sees the allocator's segments and not the tensors.
"""

import torch
from packsft_kernels import LossOptions, cross_entropy, launch

OPTIONS = (
    LossOptions(),
    LossOptions(softcap=5.0, logit_scale=0.7, label_smoothing=0.1, z_loss=1e-2, dft=True, entropy=True, correct=True),
)


def main() -> None:
    for vocab in (3, *launch.ONE_READ_SHAPES, 20_000, 20_001):  # the last: rows with edges
        for dtype in (torch.bfloat16, torch.float32):
            for options in OPTIONS:
                for inplace in (False, True):
                    leaf = torch.randn(5, vocab, device="cuda", dtype=dtype, requires_grad=True)
                    targets = torch.tensor([0, vocab - 1, -100, vocab // 2, 1], device="cuda")
                    logits = leaf.view_as(leaf)
                    cross_entropy(logits, targets=targets, options=options, inplace=inplace).loss.backward()
    torch.cuda.synchronize()
    print("every launch ran")


if __name__ == "__main__":
    main()
