"""Ulysses: an exchange of sequence shards for heads before an attention, and back behind it, with gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed import _functional_collectives as collectives


class Ulysses:
    """diffusers' ``TemplatedUlyssesAttention`` made of operators that autograd knows."""

    @staticmethod
    def apply(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, *options: Any
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attention of this rank's shards [batch, tokens / ranks, heads, head_dim] over the tokens of all ranks."""
        *shared, forward_op, _, parallel = options
        group = parallel.context_parallel_config._ulysses_mesh.get_group()
        local = key.shape[1]
        query, key, value = (to_heads(x, group) for x in (query, key, value))
        if attn_mask is not None and attn_mask.shape[-1] == local:
            attn_mask = collectives.wait_tensor(collectives.all_gather_tensor(attn_mask, attn_mask.ndim - 1, group))
        found = forward_op(
            None, query, key, value, attn_mask, *shared, _save_ctx=False, _parallel_config=parallel
        )  # fmt: skip
        if not isinstance(found, tuple):
            return to_tokens(found, group)
        out, lse, *_ = found
        return to_tokens(out, group), to_tokens(lse.reshape(*out.shape[:3], 1), group).squeeze(-1)


def to_heads(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[batch, tokens / ranks, heads, head_dim] of this rank to [batch, tokens, heads / ranks, head_dim].

    Raises:
        ValueError: the ranks do not divide the heads.
    """
    batch, tokens, heads, head_dim = x.shape
    ranks = group.size()
    if heads % ranks:
        raise ValueError(f"{heads} heads cannot be shared out to {ranks} ranks: ulysses_degree must divide them")
    x = x.reshape(batch, tokens, ranks, heads // ranks, head_dim).permute(2, 1, 0, 3, 4).contiguous()
    return _exchanged(x, group).flatten(0, 1).permute(1, 0, 2, 3).contiguous()


def to_tokens(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[batch, tokens, heads / ranks, head_dim] to [batch, tokens / ranks, heads, head_dim]: the inverse of ``to_heads``."""
    batch, tokens, heads, head_dim = x.shape
    ranks = group.size()
    x = x.reshape(batch, ranks, tokens // ranks, heads, head_dim).permute(1, 3, 0, 2, 4).contiguous()
    return _exchanged(x, group).flatten(0, 1).permute(1, 2, 0, 3).contiguous()


def _exchanged(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Piece q of the first dimension goes to rank q; autograd sends gradients back."""
    # The operators themselves: in torch 2.11 the function around them is one that Dynamo keeps in a graph of its own.
    library = torch.ops._c10d_functional_autograd if torch.is_grad_enabled() else torch.ops._c10d_functional
    sizes = [x.numel() // group.size()] * group.size()
    sent = library.all_to_all_single(x.flatten(), sizes, sizes, group.group_name)
    return torch.ops._c10d_functional.wait_tensor(sent).reshape(x.shape)
