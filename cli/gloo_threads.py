"""The end of a run on CPU processes, whose exit code is to say how the run went."""

import atexit
import time

import torch.distributed as dist

# A thread of gloo needs the interpreter for microseconds; 0.1 s leaves it time to be scheduled on a busy machine.
_SECONDS = 0.1


def await_gloo_threads_at_exit() -> None:
    """Lets gloo's threads drop their last tensors before the interpreter ends.

    A thread that carried out a collective may be the last owner of its tensors, and needs the interpreter to free them.
    If the interpreter is ending by then, the thread cannot have it, and takes the process down with SIGABRT
    ("terminate called without an active exception", exit code -6), although the run is complete
    (pytorch/pytorch#179291). ``destroy_process_group`` does not wait for these threads as long as anything, such as a
    ``DeviceMesh``, holds the group.
    """
    atexit.unregister(_await_gloo_threads)  # several runs in one program wait once
    atexit.register(_await_gloo_threads)


def _await_gloo_threads() -> None:
    # Lightning destroys NCCL's groups itself, in a handler that was registered later and so ran before this one.
    if dist.is_available() and dist.is_initialized():
        time.sleep(_SECONDS)
