"""A command in one of several processes that torchrun has started, on one of which something happens:

    python -m torch.distributed.run --standalone --nproc_per_node=2 tests/processes.py EVENT train --max_iter=6 …
"""
import importlib
import os
import random
import signal
import sys
import threading
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]

import torch  # noqa: E402

import grpo  # noqa: E402
import train  # noqa: E402
from runtime.config import BadInput  # noqa: E402

torch.set_num_threads(1)
event, script, *flags = sys.argv[1:]
rank, n_restarts = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
loss_fn, n_batches = train.next_token_loss, 0


def watched(model, batch):
    global n_batches
    n_batches += 1
    if event == "clock" and n_batches == 1:
        clock.start()
    if n_batches == 5 and rank == 1 and not n_restarts:  # the first batch of the third step, where each has two
        if event == "signal":
            signal.raise_signal(signal.SIGTERM)
        elif event == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif event == "raise":
            raise OSError("no more data here")
    return loss_fn(model, batch)


def kill():
    print(f"{rank} killed itself", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


if event == "kill_often" and n_restarts < 10 and n_restarts % 2 == rank:
    clock = threading.Timer(random.Random(n_restarts).uniform(0, 1), kill)
    clock.daemon = True
    event = "clock"
train.next_token_loss = watched
if event == "differ":
    flags.append(f"--seed={rank}")
elif event == "less_memory":  # in one process than in the other
    train.largest_batch = lambda try_batch, device, n_blocks, *sizes: n_blocks if rank == 0 else 2
elif event == "first_fails" and rank == 0:
    def fail(*args):
        raise BadInput("--checkpoint_path=here: cannot be written")
    train.open_output = fail
elif event == "rewarded":  # see tests/test_grpo.py
    grpo.reward = lambda question, answer: float(len(answer.text) % 2)
importlib.import_module(script).main(flags)
