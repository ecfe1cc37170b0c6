"""The beginning and the end of a process group, where torch needs help."""

import atexit
import os
import socket
import time
from datetime import timedelta
from typing import Any

import torch.distributed as dist

_distributed: Any = dist  # its stub does not export TCPStore in all environments
_TIMEOUT = timedelta(minutes=5)


def leave_the_store_of_earlier_attempts() -> None:
    """Let a restarted process group meet elsewhere than its predecessor.

    Under torchrun, ranks meet in a store of its agent, which outlives them. A restarted rank that is faster than
    another finds there the address of that rank's predecessor, and waits for it in vain (torch 2.13). So rank 0 opens a
    store of its own. It does nothing in a first attempt, and without torchrun.
    """
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if attempt == "0" or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    agent = _distributed.TCPStore(address, port, is_master=False, timeout=_TIMEOUT)
    key = f"lightning_muon/port/{attempt}"
    if os.environ["RANK"] == "0":
        with socket.socket() as server:
            server.bind(("", 0))
            agent.set(key, str(server.getsockname()[1]))
    os.environ["MASTER_PORT"] = agent.get(key).decode()
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"


def await_gloo_threads_at_exit() -> None:
    """Give gloo's threads time to free their last tensors before the interpreter ends.

    A thread that is the last owner of tensors needs the interpreter to free them. While the interpreter is ending, it
    aborts the process instead ("terminate called without an active exception", exit code -6) although the run is
    complete (pytorch/pytorch#179291). ``destroy_process_group`` does not wait for these threads while anything, such as
    a ``DeviceMesh``, still refers to the group.
    """
    atexit.unregister(_await_gloo_threads)  # several runs in one program wait once
    atexit.register(_await_gloo_threads)


def _await_gloo_threads() -> None:
    # Lightning destroys NCCL's groups in a handler of its own, which was registered later and so ran before this one.
    if dist.is_available() and dist.is_initialized():
        time.sleep(0.1)  # a thread needs microseconds, and some time to be scheduled on a busy machine
