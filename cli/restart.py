"""After torchrun has restarted its processes: a process group that knows nothing of the one before."""

import os
import socket
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
