"""mla_attention over compressed keys and values in pages, and store_latent, which writes them."""

from __future__ import annotations

import torch
from torch import Tensor

from ktcore.dispatch.registry import select
from ktcore.ops import _check
from ktcore.ops._direct import direct
from ktcore.ops.attention import PAGE, check_places, check_slots, request


def mla_attention(
    query: Tensor,
    latent_pages: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    query_begin: Tensor,
    *,
    value_size: int,
    scale: float,
) -> Tensor:
    """Causal multi-head latent attention (DeepSeek-V2, arXiv 2405.04434), in its absorbed form.

    All heads share one row of keys and values at each position: the latent (kv_lora_rank columns,
    which are the values too) and the rotated key (qk_rope_head_dim). Queries have been multiplied
    by the keys' half of kv_b_proj; the result is still to be multiplied by the values' half.

    Args:
        query: [T, heads, size], float32, float16 or bfloat16; for DeepSeek-V3 size is 512 + 64.
        latent_pages: [pages, 32, size], float32, float16 or bfloat16, contiguous.
        page_table, lengths, query_begin: see `attention`.
        value_size: how many of the first columns are values.
        scale: of the products; 1 / sqrt(qk_nope_head_dim + qk_rope_head_dim), and what YaRN adds.

    Returns:
        [T, heads, value_size] in query's dtype.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
        IndexError: a page, length or begin is out of range.
    """
    _check.tensor(query, "query", _check.FLOATS, 3)
    _check_pages(latent_pages, query.device)
    if query.shape[1] == 0 or query.shape[2] != latent_pages.shape[2]:
        raise ValueError(
            f"query: expected shape [T, heads, {latent_pages.shape[2]}], as wide as latent_pages, "
            f"got {tuple(query.shape)}"
        )
    check_places(page_table, lengths, query_begin, query.device)
    _check.positive(value_size, "value_size")
    if value_size > query.shape[2]:
        raise ValueError(
            f"value_size: expected at most {query.shape[2]}, the latents' columns, got {value_size}"
        )
    _check.number(scale, "scale")
    call = _compute if direct(query) else torch.ops.ktcore.mla_attention
    return call(
        query, latent_pages, page_table, lengths, query_begin, int(value_size), float(scale)
    )


def store_latent(latent: Tensor, latent_pages: Tensor, slots: Tensor) -> None:
    """Write tokens' latents into pages.

    Args:
        latent: [T, size], float32, float16 or bfloat16.
        latent_pages: see `mla_attention`; written to.
        slots: see `store_kv`.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
        IndexError: a slot is out of range.
    """
    _check.tensor(latent, "latent", _check.FLOATS, 2)
    _check_pages(latent_pages, latent.device)
    if latent.shape[1] != latent_pages.shape[2]:
        raise ValueError(
            f"latent: expected shape [T, {latent_pages.shape[2]}], as wide as latent_pages, got "
            f"{tuple(latent.shape)}"
        )
    check_slots(slots, latent.shape[0], latent.device)
    call = _store if direct(latent) else torch.ops.ktcore.store_latent
    call(latent, latent_pages, slots)


def _check_pages(latent_pages: Tensor, device: torch.device) -> None:
    _check.tensor(latent_pages, "latent_pages", _check.FLOATS, 3)
    if latent_pages.shape[1] != PAGE or latent_pages.shape[2] == 0:
        raise ValueError(
            f"latent_pages: expected shape [pages, {PAGE}, size], got {tuple(latent_pages.shape)}"
        )
    _check.device(latent_pages, "latent_pages", device, "the tokens")
    if not latent_pages.is_contiguous():
        raise ValueError(
            f"latent_pages: expected a contiguous tensor, got strides {latent_pages.stride()}"
        )


def _compute(
    query: Tensor,
    latent_pages: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    query_begin: Tensor,
    value_size: int,
    scale: float,
) -> Tensor:
    return select(request("mla_attention", query)).run(
        _check.detached(query),
        latent_pages,
        page_table.contiguous(),
        lengths.contiguous(),
        query_begin.contiguous(),
        value_size,
        scale,
    )


def _store(latent: Tensor, latent_pages: Tensor, slots: Tensor) -> None:
    select(request("store_latent", latent)).run(
        _check.detached(latent), latent_pages, slots.contiguous()
    )


_mla_attention = torch.library.custom_op("ktcore::mla_attention", _compute, mutates_args=())
_store_latent = torch.library.custom_op(
    "ktcore::store_latent", _store, mutates_args=("latent_pages",)
)


@_mla_attention.register_fake
def _(query, latent_pages, page_table, lengths, query_begin, value_size, scale):
    return query.new_empty((*query.shape[:2], value_size))


@_store_latent.register_fake
def _(latent, latent_pages, slots):
    return None
