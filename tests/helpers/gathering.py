"""The contrastive loss on a batch that several processes share; a file of its own because each process imports it."""

import torch
import torch.distributed as dist
import torch.nn.functional as F

from batching_mra import gather_constant, gather_features
from losses_mra import contrastive_loss


def make_pair(seed: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Image and text features of four rows, by the recipe of the vectors."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(4, dim, generator=generator)
    return image, 0.5 * image + torch.randn(4, dim, generator=generator)


def run_contrastive(rank: int, world: int, port: int, queue) -> None:
    """Puts one process's loss and gradients of both modes, with and without smoothing, in the queue."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    rows = slice(rank * 4 // world, (rank + 1) * 4 // world)
    identities = torch.tensor([0, 1, 0, 2])[rows]
    results = {}
    for mode in ("exact", "published"):
        for smoothing in (0, 0.2):
            image, text = (x[rows].clone().requires_grad_() for x in make_pair(21, 2048))
            temperature = torch.tensor(0.07, requires_grad=True)
            features = (gather_features(F.normalize(x, dim=-1), mode) for x in (image, text))
            loss = contrastive_loss(*features, gather_constant(identities), temperature, smoothing)
            loss.backward()
            results[mode, smoothing] = (loss.item(), temperature.grad.item(), image.grad.tolist())
    queue.put((rank, results))
    dist.barrier()
    dist.destroy_process_group()
