"""Data loaders for packed data sets and streams. Each rank reads its share: no loader is sharded by accelerate."""

from __future__ import annotations

import functools
import itertools
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import torch
from accelerate.data_loader import SeedableRandomSampler, prepare_data_loader
from datasets import Dataset
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, Sampler, SequentialSampler
from transformers import Trainer
from transformers.trainer_pt_utils import BatchRebalanceSampler, LengthGroupedSampler
from transformers.trainer_utils import TrainOutput, seed_worker

from packsft.data.divided import DividedSteps
from packsft.data.exchange import Exchange
from packsft.data.packs import PackedDataset, PackSampler, UserPacks
from packsft.data.ranks import Ranks
from packsft.data.steps import StepDataset, StepStream
from packsft.data.streams import PackedStream

Packs = PackedDataset | UserPacks | PackedStream


class PackedLoaders(Trainer):
    """The loaders of a trainer whose data sets may be packed; mixed into a trainer before its class.

    The trainer sets `_passes`, which holds the limit of tokens per pass, and `_tokens_in_evaluation`, a lower one.

    Attributes:
        _order: what the order of the training set depends on, beside the seed; kept in checkpoints.
    """

    _passes: Any
    _tokens_in_evaluation: int
    _order: dict[str, Any]
    _loop_has_loader: bool | None = None  # None while no training loop runs

    def _inner_training_loop(self, *positional: Any, **named: Any) -> TrainOutput:
        """Adds to the parent: which loader is the loop's."""
        self._loop_has_loader = False
        try:
            return super()._inner_training_loop(*positional, **named)
        finally:
            self._loop_has_loader = None

    def get_train_dataloader(self) -> DataLoader:
        """Adds to the parent: packs, or optimizer steps."""
        dataset = self._packs_of(self.train_dataset)
        if dataset is None:
            return super().get_train_dataloader()
        another = bool(self._loop_has_loader)  # a callback looks at a batch: the run keeps its order and its steps
        loader = self._loader(dataset, self._train_batch_size, dict(self._order) if another else self._order)
        if dataset.strategy.exact_steps and not another:
            self._passes.steps = loader.dataset
        if self._loop_has_loader is not None:
            self._loop_has_loader = True
        return loader

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Adds to the parent: packs, or steps of as many examples as a batch."""
        if isinstance(eval_dataset, str):
            sets = self.eval_dataset if isinstance(self.eval_dataset, dict) else {}
            if eval_dataset not in sets:
                raise ValueError(
                    f"there is no evaluation set {eval_dataset!r}, only {', '.join(sets) or 'one or none'}"
                )
            dataset = sets[eval_dataset]
        else:
            dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        packs = self._packs_of(dataset)
        if packs is None:
            return super().get_eval_dataloader(eval_dataset)
        if not self.args.dataloader_persistent_workers or not self._is_own(dataset):
            return self._loader(packs, self.args.eval_batch_size)
        self._eval_loaders = getattr(self, "_eval_loaders", {})  # keeps their workers for the next evaluation
        if dataset not in self._eval_loaders:
            self._eval_loaders[dataset] = self._loader(packs, self.args.eval_batch_size)
        return self._eval_loaders[dataset]

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        """Adds to the parent: packs, or steps of as many examples as a batch."""
        packs = self._packs_of(test_dataset)
        if packs is None:
            return super().get_test_dataloader(test_dataset)
        return self._loader(packs, self.args.eval_batch_size)

    def _packs_of(self, dataset: Any) -> Packs | None:
        """None for a data set of another library."""
        if isinstance(dataset, Dataset):
            self._user_packs = {k: v for k, v in getattr(self, "_user_packs", {}).items() if self._is_own(v.rows)}
            if id(dataset) not in self._user_packs:
                self._user_packs[id(dataset)] = UserPacks(dataset, self.data_collator.vocab_size)
            return self._user_packs[id(dataset)]
        return dataset if isinstance(dataset, (PackedDataset, PackedStream)) else None

    def _is_own(self, dataset: Any) -> bool:
        """Whether it is the training set or an evaluation set of the trainer, and will be asked for again."""
        evals = self.eval_dataset.values() if isinstance(self.eval_dataset, dict) else [self.eval_dataset]
        return any(dataset is own for own in (self.train_dataset, *evals))

    def _check_last_batch(self, packs: Packs, batch_size: int, name: str) -> None:
        """Raises ValueError if `dataloader_drop_last` leaves no batch."""
        batch_size *= 1 if self.args.accelerator_config.split_batches else Ranks.of(self.accelerator).size
        if self.args.dataloader_drop_last and not isinstance(packs, PackedStream) and len(packs) < batch_size:
            raise ValueError(
                f"dataloader_drop_last=True leaves nothing of the {name}: {len(packs)} packs, and a batch on all "
                f"ranks takes {batch_size}"
            )

    def _loader(self, dataset: Packs, batch_size: int, order: dict[str, Any] | None = None) -> DataLoader:
        """The loader of transformers' trainer, for packs. With exact steps, an item is an optimizer step.

        Args:
            batch_size: items on each rank; with exact steps, examples of a step on each rank.
            order: of training: filled with what the order depends on, or read, if a run resumes. None for evaluation.
        """
        training, args, accelerator, collator = order is not None, self.args, self.accelerator, self.data_collator
        ranks = Ranks.of(accelerator)
        sampler = None if isinstance(dataset, PackedStream) else self._sampler(dataset, batch_size, ranks, order)
        source: Any = dataset
        ranks_of_batches = ranks
        if dataset.strategy.exact_steps:
            step_size = batch_size * (1 if args.accelerator_config.split_batches else ranks.size)
            limit = self._passes.tokens_per_pass
            limit = limit if training else min(limit, self._tokens_in_evaluation)
            steps = StepDataset if isinstance(dataset, PackedDataset) else StepStream
            source = steps(dataset, step_size, limit, ranks, collator.padded)
            batch_size = 1 if sampler is None else step_size
            ranks_of_batches = Ranks()  # every rank asks for the whole step
        elif isinstance(dataset, PackedStream) and ranks.size > 1:
            source = dataset.share(ranks, endless=training)
        seeds_workers = training and sampler is not None
        workers: dict[str, Any] = {
            "num_workers": args.dataloader_num_workers,
            "persistent_workers": args.dataloader_persistent_workers,
            "multiprocessing_context": args.dataloader_multiprocessing_context,
            "prefetch_factor": args.dataloader_prefetch_factor,
            "in_order": args.dataloader_in_order,
            "worker_init_fn": functools.partial(
                _start_worker, seed=(args.dataloader_num_workers, args.process_index) if seeds_workers else None
            ),
        }
        if isinstance(dataset, PackedStream) and dataset.divisible and not accelerator.use_stateful_dataloader:
            chunks = functools.partial(DataLoader, batch_size=None, generator=torch.Generator(), **workers)
            source = DividedSteps(source, chunks, Exchange.of_run())
            workers = {}

        options: dict[str, Any] = {"batch_size": batch_size}
        if sampler is not None:
            options = {"batch_sampler": sampler}
            if not isinstance(sampler, BatchRebalanceSampler):
                whole = batch_size * (1 if args.accelerator_config.split_batches else ranks_of_batches.size)
                options = {"batch_sampler": RankBatches(sampler, whole, ranks_of_batches, args.dataloader_drop_last)}
        # The loader draws a number each epoch. From a generator of its own for evaluation, and for workers that stay:
        # these draw once, at the first epoch or where a run resumes.
        draws = training and not args.dataloader_persistent_workers
        loader = DataLoader(
            source,
            collate_fn=collator,
            pin_memory=args.dataloader_pin_memory,
            generator=None if draws else torch.Generator(),
            **options,
            **workers,
        )
        return prepare_data_loader(  # as `accelerator.prepare`, without sharding: each rank already has its share
            loader,
            accelerator.device,
            num_processes=1,
            process_index=0,
            put_on_device=accelerator.device_placement,
            rng_types=list(accelerator.rng_types),
            dispatch_batches=False,
            non_blocking=accelerator.non_blocking,
            use_stateful_dataloader=accelerator.use_stateful_dataloader,
        )

    def _sampler(
        self, dataset: PackedDataset | UserPacks, batch_size: int, ranks: Ranks, order: dict[str, Any] | None
    ) -> Sampler:
        """The sampler of `train_sampling_strategy`. If packs differ between epochs, their order balances the ranks.

        What it takes from the batch size and the ranks is kept in `order`: a run that resumes with others keeps its
        order. Raises ValueError if the trainer overrides the method that makes transformers' sampler.
        """
        args, accelerator = self.args, self.accelerator
        training, order = order is not None, {} if order is None else order
        name = "_get_train_sampler" if training else "_get_eval_sampler"
        if getattr(type(self), name) is not getattr(Trainer, name):
            raise ValueError(
                f"{type(self).__name__} overrides {name}, which packs and exact steps do not ask: set "
                "train_sampling_strategy, put the rows in order, or override the method that makes the data loader"
            )
        # ranks that share a row draw other numbers in their model, and the same ones here
        seed = torch.random.initial_seed() if accelerator.num_processes == 1 else args.seed
        strategy, accumulation = args.train_sampling_strategy, args.gradient_accumulation_steps
        if strategy == "group_by_length":
            size = args.train_batch_size * accumulation if training else args.eval_batch_size
            own = seed if not training or args.world_size > 1 else None
            return GroupedByLength(order.setdefault("group", size), dataset.lengths.tolist(), own, order)
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
        if isinstance(dataset, PackedDataset) and dataset.repacks:
            return PackSampler(dataset, order.setdefault("group", batch_size * ranks.size))
        if accelerator.use_seedable_sampler or accelerator.num_processes > 1:  # the same order on every rank
            return SeedableRandomSampler(dataset, data_seed=seed if args.data_seed is None else args.data_seed)
        return RandomOrder(dataset, order)


def _start_worker(worker: int, seed: tuple[int, int] | None) -> None:
    """Obeys SIGTERM only from the training process: that saves a checkpoint first, if all processes receive it."""
    if hasattr(signal, "sigwaitinfo"):  # not on Windows and macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    if seed is not None:
        seed_worker(worker, *seed)


def _end_with(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


class RankBatches(BatchSampler):
    """The batches of one rank. All ranks have equally many: at the end, they are filled with None, which gives no pack.

    Args:
        sampler: the same order on every rank.
        size: items that all ranks take together.
        ranks: the place of this rank; it takes its part of every `size` items.
        drop_last: whether to leave out items at the end that are fewer than `size`.

    Raises:
        ValueError: `size` cannot be divided by the number of ranks.
    """

    def __init__(self, sampler: Sampler, size: int, ranks: Ranks, drop_last: bool) -> None:
        if size % ranks.size:
            raise ValueError(
                f"a batch size of {size} with split_batches=True must be a multiple of the {ranks.size} ranks"
            )
        super().__init__(sampler, size // ranks.size, drop_last)
        self._size, self._rank = size, ranks.rank

    def __len__(self) -> int:
        items = len(self.sampler)  # type: ignore[arg-type]  # of ours, all have a length
        return items // self._size if self.drop_last else -(-items // self._size)

    def __iter__(self) -> Iterator[list[Any]]:
        items = iter(self.sampler)
        while group := list[Any](itertools.islice(items, self._size)):
            short = self._size - len(group)
            if short and self.drop_last:
                return
            if self._size > self.batch_size:
                group += [None] * short
            yield group[self._rank * self.batch_size : (self._rank + 1) * self.batch_size]


def _drawn_from(order: dict[str, Any]) -> torch.Generator | None:
    """What draws the order of an epoch: PyTorch's own generator (None), whose state is kept in `order`; or that state,
    if a run resumes within the epoch."""
    if (state := order.pop("resumed_state", None)) is None:
        order["random_state"] = torch.get_rng_state()
        return None
    order["random_state"] = state
    generator = torch.Generator()
    generator.set_state(state)
    return generator


class RandomOrder(RandomSampler):
    """PyTorch's sampler, whose order a resumed run finds again."""

    def __init__(self, dataset: Any, order: dict[str, Any]) -> None:
        super().__init__(dataset)
        self._order = order

    def __iter__(self) -> Iterator[int]:
        seed = torch.empty((), dtype=torch.int64).random_(generator=_drawn_from(self._order))
        self.generator = torch.Generator().manual_seed(int(seed))  # as the parent does
        return super().__iter__()


class GroupedByLength(LengthGroupedSampler):
    """transformers' sampler, whose order a resumed run finds again.

    With a `seed` it draws from a generator of the epoch: for several ranks, whose states need not agree, and for
    evaluation, which may not change what training draws.
    """

    def __init__(self, batch_size: int, lengths: list[int], seed: int | None, order: dict[str, Any]) -> None:
        super().__init__(batch_size, lengths=lengths)
        self._seed, self._epoch, self._order = seed, 0, order

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        own = None if self._seed is None else torch.Generator().manual_seed(self._seed + self._epoch)
        self.generator = own or _drawn_from(self._order)
        return super().__iter__()
