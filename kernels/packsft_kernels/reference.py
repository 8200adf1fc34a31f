"""The definitions in plain PyTorch. Every kernel and every fast path is compared with them.

Written to be read, to run in float64, and to be differentiated by autograd. No chunks, no kernels, not fast.

Legend: T tokens, N scored rows, V vocabulary, M model width, R rank.
"""

import torch
import torch.nn.functional as F

from packsft_kernels.loss_options import LossOptions, LossOutput

_DEFAULT_OPTIONS = LossOptions()


def cross_entropy(
    logits: torch.Tensor,
    labels: torch.Tensor | None = None,
    *,
    shift: bool = True,
    rows: torch.Tensor | None = None,
    targets: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
    options: LossOptions = _DEFAULT_OPTIONS,
    num_items: int | torch.Tensor | None = None,
    reduction: str = "mean",
) -> LossOutput:
    """Cross-entropy of `logits` [..., V] with `labels` [...] (shifted here), or with `targets` [N] in `rows` [N]."""
    if labels is not None:
        if shift:
            labels = F.pad(labels[..., 1:], (0, 1), value=options.ignore_index)
        targets = labels.flatten()
    assert targets is not None
    logits_NV = logits.flatten(0, -2)
    if rows is not None:
        logits_NV = logits_NV[rows.long()]
    scored_N = targets != options.ignore_index
    # An ignored row may hold anything, even NaN: it is cleared before any arithmetic.
    logits_NV = logits_NV.masked_fill(~scored_N[:, None], 0.0)
    targets = targets.masked_fill(~scored_N, 0)

    z_NV = logits_NV * options.logit_scale
    if options.softcap is not None:
        z_NV = options.softcap * torch.tanh(z_NV / options.softcap)
    log_p_NV = torch.log_softmax(z_NV, -1)
    log_prob_N = log_p_NV.gather(-1, targets[:, None]).squeeze(-1)
    lse_N = torch.logsumexp(z_NV, -1)
    loss_N = -log_prob_N
    if options.label_smoothing:
        loss_N = (1 - options.label_smoothing) * loss_N - options.label_smoothing * log_p_NV.mean(-1)
    if options.dft:
        loss_N = log_prob_N.detach().exp() * loss_N
    if options.z_loss:
        loss_N = loss_N + options.z_loss * lse_N**2
    if weights is not None:
        loss_N = loss_N * weights.flatten()
    loss_N = loss_N.masked_fill(~scored_N, 0.0)

    if reduction == "mean":
        loss = loss_N.sum() / (scored_N.sum().clamp(min=1) if num_items is None else num_items)
    else:
        loss = loss_N.sum() if reduction == "sum" else loss_N
    return LossOutput(
        loss,
        log_prob_N.masked_fill(~scored_N, 0.0).detach(),
        torch.special.entr(log_p_NV.exp()).sum(-1).masked_fill(~scored_N, 0.0).detach() if options.entropy else None,
        (z_NV.argmax(-1) == targets) & scored_N if options.correct else None,
        lse_N.masked_fill(~scored_N, 0.0).detach(),
    )


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    rows: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
    low_rank: tuple[torch.Tensor, torch.Tensor] | None = None,
    options: LossOptions = _DEFAULT_OPTIONS,
    num_items: int | torch.Tensor | None = None,
    reduction: str = "mean",
) -> LossOutput:
    """Cross-entropy of `F.linear(hidden [T, M], weight [V, M], bias [V])` in `rows` [N] with `targets` [N].

    `low_rank` is (down [T, R], up [V, R]): `down @ up.T` is added to the logits.
    """
    # Ignored rows must not reach `weight.grad`: 0 * NaN is NaN.
    ignored_N1 = (targets == options.ignore_index)[:, None]

    def scored(matrix: torch.Tensor) -> torch.Tensor:
        return (matrix if rows is None else matrix[rows.long()]).masked_fill(ignored_N1, 0.0)

    logits = F.linear(scored(hidden), weight, bias)
    if low_rank is not None:
        down, up = low_rank
        logits = logits + F.linear(scored(down), up)
    return cross_entropy(
        logits,
        targets=targets,
        weights=weights,
        options=options,
        num_items=num_items,
        reduction=reduction,
    )


def varlen_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    *,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of `q` [T, H, K] on `k`, `v` [T, G, K] within documents, with a [T, T] mask. No fast path builds it."""
    num_tokens, groups = q.shape[0], q.shape[1] // k.shape[1]
    k_THK, v_THK = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    position = torch.arange(num_tokens, device=q.device)
    document = torch.bucketize(position, cu_seqlens[1:].to(torch.int64), right=True)
    distance = position[:, None] - position[None, :]
    seen = document[:, None] == document[None, :]
    if causal:
        seen = seen & (distance >= 0)
    if window is not None:
        seen = seen & (distance.abs() < window)
    scores_HTT = torch.einsum("qhk,shk->hqs", q, k_THK) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores_HTT = softcap * torch.tanh(scores_HTT / softcap)
    scores_HTT = scores_HTT.masked_fill(~seen, float("-inf"))
    if sinks is not None:
        scores_HTT = torch.cat([scores_HTT, sinks.to(q.dtype)[:, None, None].expand(-1, num_tokens, 1)], -1)
    return torch.einsum("hqs,shk->qhk", scores_HTT.softmax(-1)[..., :num_tokens], v_THK)
