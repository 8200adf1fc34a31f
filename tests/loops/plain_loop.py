"""A plain training loop on batches of `pack`, and what the tests give it."""

import torch
from transformers import BloomConfig, BloomForCausalLM

STEP = {"per_device_train_batch_size": 6, "tokens_per_pass": 40}
PACK = {"batch_size": 6, "tokens_per_pass": 40}


def weights(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters() if parameter.requires_grad])


def loop(model, data, epochs=2, **options):
    """The losses of a plain loop."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    found = []
    loader = data.loader(padded=model.packing.padded, **options)
    for _ in range(epochs):
        for step in loader:
            loss = 0.0
            for batch in step:
                part = model(**batch).loss
                part.backward()
                loss += float(part.detach())
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss)
    return found


def bloom():
    """A model that cannot be packed, in float64."""
    torch.manual_seed(0)
    return BloomForCausalLM(BloomConfig(vocab_size=24, hidden_size=32, n_layer=2, n_head=4)).double()
