"""Runs a script in several gloo processes under `accelerate launch`."""

import contextlib
import os
import random
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import packsft_kernels
import torch

import packsft


def launch(
    script: Path, processes: int, *arguments: object, nodes: int = 1, config: Path | None = None, **environment: str
) -> str:
    """Run a Python file on the CPU; returns what it wrote to stderr, on all nodes. Does not look at the exit code: gloo
    may abort while it is taken down. With `config`, a configuration file of accelerate decides what else it decides."""
    roots = [Path(__file__).parent, *(Path(package.__file__).parents[1] for package in (packsft, packsft_kernels))]
    path = os.pathsep.join([*map(str, roots), os.environ.get("PYTHONPATH", "")])
    port = 0 if nodes == 1 else _free_port()  # 0: the agent finds one
    running = []
    for node in range(nodes):
        engine = ["--multi_gpu"] if config is None else [f"--config_file={config}"]
        how = ["-m", "accelerate.commands.launch", *engine, f"--num_machines={nodes}", f"--machine_rank={node}",
               f"--num_processes={processes}", "--main_process_ip=127.0.0.1", f"--main_process_port={port}",
               "--mixed_precision=no", "--dynamo_backend=no"]  # fmt: skip
        command = [sys.executable, *(how if processes > 1 else []), str(script), *map(str, arguments)]
        env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path} | environment
        said = tempfile.TemporaryFile("w+")  # noqa: SIM115 (a pipe that nobody reads would stop a node)
        running.append((subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=said), said))
    try:
        for agent, said in running:
            agent.wait(timeout=240)
            said.seek(0)
        return "".join(said.read() for _, said in running)
    finally:
        for agent, said in running:
            agent.terminate()  # it ends its processes
            agent.wait()
            said.close()


def _free_port() -> int:
    """Below those that the system gives to connections: a node that connects to one of them before the other listens
    may be connected to itself."""
    for port in random.sample(range(20_000, 30_000), 100):
        with socket.socket() as bound, contextlib.suppress(OSError):
            bound.bind(("127.0.0.1", port))
            return port
    raise OSError("no port between 20,000 and 30,000 is free")


def results_of(script: Path, processes: int, output: Path, *arguments: object, **how: Any) -> Any:
    """What the script saves with `torch.save` in its first argument, at its end."""
    output.unlink(missing_ok=True)
    said = launch(script, processes, output, *arguments, **how)
    assert output.exists(), said[-3000:]
    return torch.load(output)
