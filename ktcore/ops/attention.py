"""attention over keys and values in pages, and store_kv, which writes them."""

from __future__ import annotations

import torch
from torch import Tensor

from ktcore.dispatch.registry import Request, select
from ktcore.ops import _check
from ktcore.ops._direct import direct

PAGE = 32  # positions of a page


def attention(
    query: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    query_begin: Tensor,
    *,
    scale: float | None = None,
) -> Tensor:
    """Causal attention of sequences over their paged keys and values.

    Query heads that are neighbours share a head of keys and values (grouped-query attention, arXiv
    2305.13245). The queries of a sequence are its last positions: of n tokens, token i stands at
    ``length - n + i`` and sees all positions up to its own.

    Args:
        query: [T, heads, key_size], float32, float16 or bfloat16: the tokens of all sequences, one
            after the other.
        key_pages: [pages, kv_heads, key_size, 32], float32, float16 or bfloat16, contiguous; heads
            is a multiple of kv_heads. Positions are the last dimension: see `store_kv`.
        value_pages: [pages, kv_heads, 32, value_size], of key_pages' dtype, contiguous.
        page_table: [sequences, most pages of one] int32: which page holds positions 32 i to
            32 i + 31 of a sequence.
        lengths: [sequences] int64: positions of each, its tokens here included.
        query_begin: [sequences + 1] int64: where each sequence's tokens begin in `query`; the first
            is 0, the last T.
        scale: of the products of queries and keys; 1 / sqrt(key_size) by default.

    Returns:
        [T, heads, value_size] in query's dtype. A sequence's result does not depend on the others.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
        IndexError: a page, length or begin is out of range.
    """
    _check.tensor(query, "query", _check.FLOATS, 3)
    _, heads, key_size = query.shape
    _check_pages(key_pages, value_pages, query.device)
    if key_pages.shape[2] != key_size or key_size == 0:
        raise ValueError(
            f"query: expected shape [T, heads, {key_pages.shape[2]}], as wide as the keys in "
            f"key_pages, got {tuple(query.shape)}"
        )
    if heads == 0 or heads % key_pages.shape[1]:
        raise ValueError(
            f"query: expected a multiple of {key_pages.shape[1]} heads, those of key_pages, got "
            f"{heads}"
        )
    check_places(page_table, lengths, query_begin, query.device)
    if scale is None:
        scale = key_size**-0.5
    _check.number(scale, "scale")
    call = _compute if direct(query) else torch.ops.ktcore.attention
    return call(query, key_pages, value_pages, page_table, lengths, query_begin, float(scale))


def store_kv(
    key: Tensor, value: Tensor, key_pages: Tensor, value_pages: Tensor, slots: Tensor
) -> None:
    """Write tokens' keys and values into pages.

    Args:
        key: [T, kv_heads, key_size], float32, float16 or bfloat16.
        value: [T, kv_heads, value_size], of key's dtype.
        key_pages, value_pages: see `attention`; written to.
        slots: [T] int64: ``32 * page + position in it`` of each token, or -1 for one that is not
            to be stored. No slot twice.

    What float16 pages cannot hold becomes their largest number; infinities become NaN.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
        IndexError: a slot is out of range.
    """
    _check.tensor(key, "key", _check.FLOATS, 3)
    _check.tensor(value, "value", (key.dtype,), 3)
    _check.device(value, "value", key.device, "key")
    _check_pages(key_pages, value_pages, key.device)
    for name, given, columns in (
        ("key", key, key_pages.shape[2]),
        ("value", value, value_pages.shape[3]),
    ):
        expected = (key.shape[0], key_pages.shape[1], columns)
        if tuple(given.shape) != expected:
            raise ValueError(
                f"{name}: expected shape {list(expected)}, as the pages have it, got "
                f"{tuple(given.shape)}"
            )
    check_slots(slots, key.shape[0], key.device)
    call = _store if direct(key) else torch.ops.ktcore.store_kv
    call(key, value, key_pages, value_pages, slots)


def check_places(
    page_table: Tensor, lengths: Tensor, query_begin: Tensor, device: torch.device
) -> None:
    """What says where sequences are; its values are checked where they are used."""
    _check.tensor(page_table, "page_table", (torch.int32,), 2)
    sequences = page_table.shape[0]
    for name, value, size in (
        ("lengths", lengths, sequences),
        ("query_begin", query_begin, sequences + 1),
    ):
        _check.tensor(value, name, (torch.int64,), 1)
        if value.shape[0] != size:
            raise ValueError(
                f"{name}: expected shape [{size}], for page_table's sequences, got "
                f"{tuple(value.shape)}"
            )
        _check.device(value, name, device, "query")
    _check.device(page_table, "page_table", device, "query")


def check_slots(slots: Tensor, tokens: int, device: torch.device) -> None:
    _check.tensor(slots, "slots", (torch.int64,), 1)
    if slots.shape[0] != tokens:
        raise ValueError(
            f"slots: expected shape [{tokens}], one for each token, got {tuple(slots.shape)}"
        )
    _check.device(slots, "slots", device, "the tokens")


def _check_pages(key_pages: Tensor, value_pages: Tensor, device: torch.device) -> None:
    _check.tensor(key_pages, "key_pages", _check.FLOATS, 4)
    _check.tensor(value_pages, "value_pages", (key_pages.dtype,), 4)
    if key_pages.shape[3] != PAGE or key_pages.shape[1] == 0:
        raise ValueError(
            f"key_pages: expected shape [pages, kv_heads, key_size, {PAGE}], got "
            f"{tuple(key_pages.shape)}"
        )
    expected = (*key_pages.shape[:2], PAGE)
    if value_pages.shape[:3] != expected or value_pages.shape[3] == 0:
        raise ValueError(
            f"value_pages: expected shape {[*expected, 'value_size']}, got "
            f"{tuple(value_pages.shape)}"
        )
    for name, pages in (("key_pages", key_pages), ("value_pages", value_pages)):
        _check.device(pages, name, device, "the tokens")
        if not pages.is_contiguous():
            raise ValueError(f"{name}: expected a contiguous tensor, got strides {pages.stride()}")


def request(op: str, x: Tensor) -> Request:
    """What is asked of an implementation about tokens x [T, ...]."""
    return Request(
        op=op,
        tokens=x.shape[0],
        hidden_size=x.shape[-1],
        dtype=str(x.dtype).removeprefix("torch."),
        device=x.device.type,
    )


def _compute(
    query: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    query_begin: Tensor,
    scale: float,
) -> Tensor:
    return select(request("attention", query)).run(
        _check.detached(query),
        key_pages,
        value_pages,
        page_table.contiguous(),
        lengths.contiguous(),
        query_begin.contiguous(),
        scale,
    )


def _store(
    key: Tensor, value: Tensor, key_pages: Tensor, value_pages: Tensor, slots: Tensor
) -> None:
    select(request("store_kv", key)).run(
        _check.detached(key), _check.detached(value), key_pages, value_pages, slots.contiguous()
    )


_attention = torch.library.custom_op("ktcore::attention", _compute, mutates_args=())
_store_kv = torch.library.custom_op(
    "ktcore::store_kv", _store, mutates_args=("key_pages", "value_pages")
)


@_attention.register_fake
def _(query, key_pages, value_pages, page_table, lengths, query_begin, scale):
    return query.new_empty((*query.shape[:2], value_pages.shape[3]))


@_store_kv.register_fake
def _(key, value, key_pages, value_pages, slots):
    return None
