"""Runs a function in several processes joined by gloo."""

import multiprocessing
import queue
import traceback

import torch

_context = multiprocessing.get_context("forkserver")  # forked from a process that has torch and no threads
_context.set_forkserver_preload(["torch._dynamo", "torch.distributed.checkpoint", "sae_kernels.train"])


def _rank(rank, size, store, results, function, arguments):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    try:
        results.put((rank, None, function(rank, size, *arguments)))
    except BaseException:
        results.put((rank, traceback.format_exc(), None))
    finally:
        torch.distributed.destroy_process_group()


def run_ranks(size, tmp_path, function, *arguments):
    """function(rank, size, *arguments) in `size` processes; what they return (no tensors: save those), by rank."""
    store = tmp_path / f"store-{function.__name__}-{size}-{len(list(tmp_path.iterdir()))}"
    results = _context.Queue()
    processes = [
        _context.Process(target=_rank, args=(rank, size, store, results, function, arguments), daemon=True)
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    found = {}
    try:
        for _ in range(size):
            rank, error, value = results.get(timeout=120)
            if error:
                raise AssertionError(f"rank {rank} failed:\n{error}")
            found[rank] = value
    except queue.Empty:
        raise AssertionError(f"only ranks {sorted(found)} of {size} answered") from None
    finally:
        for process in processes:
            process.join(timeout=0 if len(found) < size else 20)
            if process.is_alive():
                process.kill()
    return [found[rank] for rank in range(size)]
