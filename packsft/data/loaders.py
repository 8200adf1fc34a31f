"""Data loaders for packed data sets and streams. Each rank reads its share.

Exact steps and streams divide themselves over ranks; accelerate deals the packs of a planned data set.
"""

from __future__ import annotations

import functools
from typing import Any

from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, Sampler, SequentialSampler
from transformers import Trainer
from transformers.trainer_pt_utils import BatchRebalanceSampler, LengthGroupedSampler
from transformers.trainer_utils import seed_worker

from packsft.data.packs import PackedDataset, PackSampler
from packsft.data.ranks import Ranks
from packsft.data.steps import StepDataset, StepStream
from packsft.data.streams import PackedStream


class PackedLoaders(Trainer):
    """The loaders of a trainer whose data sets may be packed; mixed into a trainer before its class.

    The trainer sets `_passes`, which holds the limit of tokens per pass.
    """

    _passes: Any

    def get_train_dataloader(self) -> DataLoader:
        """Adds to the parent: packs, or optimizer steps."""
        if not isinstance(self.train_dataset, (PackedDataset, PackedStream)):
            return super().get_train_dataloader()
        loader = self._loader(self.train_dataset, self._train_batch_size, training=True)
        if self.train_dataset.strategy.exact_steps:
            self._passes.steps = loader.dataset
        return loader

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Adds to the parent: packs, or steps of as many examples as a batch."""
        if isinstance(eval_dataset, str):
            dataset = self.eval_dataset[eval_dataset]
        else:
            dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if not isinstance(dataset, (PackedDataset, PackedStream)):
            return super().get_eval_dataloader(eval_dataset)
        if not self.args.dataloader_persistent_workers:
            return self._loader(dataset, self.args.eval_batch_size)
        self._eval_loaders = getattr(self, "_eval_loaders", {})  # keeps their workers for the next evaluation
        if dataset not in self._eval_loaders:
            self._eval_loaders[dataset] = self._loader(dataset, self.args.eval_batch_size)
        return self._eval_loaders[dataset]

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        """Adds to the parent: packs, or steps of as many examples as a batch."""
        if not isinstance(test_dataset, (PackedDataset, PackedStream)):
            return super().get_test_dataloader(test_dataset)
        return self._loader(test_dataset, self.args.eval_batch_size)

    def _loader(self, dataset: PackedDataset | PackedStream, batch_size: int, training: bool = False) -> DataLoader:
        return packed_loader(
            dataset,
            batch_size,
            training=training,
            args=self.args,
            accelerator=self.accelerator,
            collator=self.data_collator,
            tokens_per_pass=self._passes.tokens_per_pass,
        )


def packed_loader(
    dataset: PackedDataset | PackedStream,
    batch_size: int,
    *,
    training: bool,
    args: Any,
    accelerator: Any,
    collator: Any,
    tokens_per_pass: int,
) -> DataLoader:
    """The loader of transformers' trainer, for packs. With exact steps, an item is an optimizer step.

    Args:
        batch_size: items on each rank; with exact steps, examples of a step on each rank.
        training: sample by `train_sampling_strategy`; evaluation keeps the order.
        args: transformers' training arguments.
        accelerator: accelerate's.
        collator: a `PackingCollator`.
        tokens_per_pass: the limit of a pass, for exact steps only.
    """
    ranks = Ranks.of(accelerator)
    sampler: Sampler | None = None
    if isinstance(dataset, PackedDataset):
        sampler = _sampler(dataset, batch_size, ranks, training, args)
    source: Any = dataset
    if dataset.strategy.exact_steps:
        step_size = batch_size * (1 if args.accelerator_config.split_batches else ranks.size)
        if isinstance(dataset, PackedDataset):
            source = StepDataset(dataset, step_size, tokens_per_pass, ranks, collator.padded)
            batch_size = step_size
        else:
            source, batch_size = StepStream(dataset, step_size, tokens_per_pass, padded=collator.padded), 1
    if isinstance(source, (PackedStream, StepStream)) and ranks.size > 1:
        source = source.share(ranks, endless=training)

    options: dict[str, Any] = {"batch_size": batch_size}
    if isinstance(sampler, BatchRebalanceSampler):
        options = {"batch_sampler": sampler}
    elif not isinstance(source, IterableDataset):
        options |= {"sampler": sampler, "drop_last": args.dataloader_drop_last}
    if training and not isinstance(source, IterableDataset):
        options["worker_init_fn"] = functools.partial(
            seed_worker, num_workers=args.dataloader_num_workers, rank=args.process_index
        )
    loader = DataLoader(
        source,
        collate_fn=collator,
        num_workers=args.dataloader_num_workers,
        pin_memory=args.dataloader_pin_memory,
        persistent_workers=args.dataloader_persistent_workers,
        multiprocessing_context=args.dataloader_multiprocessing_context,
        prefetch_factor=args.dataloader_prefetch_factor,
        in_order=args.dataloader_in_order,
        **options,
    )
    if isinstance(source, PackedDataset) and not isinstance(sampler, BatchRebalanceSampler):
        return accelerator.prepare(loader)
    return prepare_data_loader(  # as `accelerator.prepare`, without sharding: each rank already has its share
        loader,
        accelerator.device,
        num_processes=1,
        process_index=0,
        put_on_device=accelerator.device_placement,
        rng_types=list(accelerator.rng_types),
        dispatch_batches=False,
        use_seedable_sampler=accelerator.use_seedable_sampler or ranks.size > 1,  # the same order on every rank
        data_seed=accelerator.dataloader_config.data_seed,
        non_blocking=accelerator.non_blocking,
        use_stateful_dataloader=accelerator.use_stateful_dataloader,
    )


def _sampler(dataset: PackedDataset, batch_size: int, ranks: Ranks, training: bool, args: Any) -> Sampler:
    """The sampler of `train_sampling_strategy`. If packs differ between epochs, their order balances the ranks."""
    strategy, accumulation = args.train_sampling_strategy, args.gradient_accumulation_steps
    if strategy == "group_by_length":
        size = args.train_batch_size * accumulation if training else args.eval_batch_size
        return LengthGroupedSampler(size, lengths=dataset.lengths.tolist())
    if strategy == "sequential" or not training:
        return SequentialSampler(dataset)
    if strategy == "batch_rebalance":
        return BatchRebalanceSampler(
            lengths=dataset.lengths.tolist(),
            effective_batch_size=args.train_batch_size * accumulation * ranks.size,
            dp_size=ranks.size,
            grad_accum=accumulation,
            rank=ranks.rank,
            drop_last=args.dataloader_drop_last,
        )
    return PackSampler(dataset, batch_size * ranks.size) if dataset.repacks else RandomSampler(dataset)
