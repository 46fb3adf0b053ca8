"""Attention written out by hand in a random way, on a :class:`graphs.Tape`: for tests that read it back.

A tensor travels with what its dimensions stand for, one letter each: ``b`` batch, ``h`` heads, ``g`` and ``r`` groups of
heads and the heads of a group, ``q`` queries, ``k`` keys, ``d`` channels. ``"bh"`` is a folded dimension, ``""`` one that
is one wide.
"""

from __future__ import annotations

import operator
from collections import Counter
from dataclasses import dataclass, field
from math import prod
from random import Random
from typing import Any

import torch
from graphs import Tape, getitem
from spelled_masks import MASKS
from torch import fx
from torch.nn import functional as F
from vmoba_compile.passes.sizes import value_of

GRIDS = [(2, 2, 2), (2, 1, 2), (3, 1, 3), (2, 3, 2), (3, 2, 1), (4, 1, 1)]
Dims = tuple[str, ...]


@dataclass(frozen=True)
class Part:
    """A tensor and what its dimensions stand for."""

    node: fx.Node
    dims: Dims


@dataclass
class Speller:
    """Draws one spelling, and counts in ``ways`` which were open to it and which it took."""

    random: Random
    dtype: torch.dtype = torch.float32
    ways: Counter[str] = field(default_factory=Counter)
    tape: Tape = field(default_factory=Tape)
    sizes: dict[str, int] = field(default_factory=dict)
    heads: str = "h"  # the letters of the queries' heads
    key_heads: str = "h"
    on_scores: float | None = None  # what the scores are still to be multiplied with
    masked: bool = False
    late: bool = True  # the sum of the exponentials may divide the result

    def change(self, stage: str, part: Part) -> Part:
        """What stands in the place of a part at a stage: query, key, value, product, scores, weights, result."""
        return part

    def pick(self, *choices: Any) -> Any:
        return self.random.choice(choices)

    def way(self, kind: str, *names: str) -> str:
        """One of the ways to spell something."""
        name = self.pick(*names)
        self.ways.update({f"{kind}: {other}": int(other == name) for other in dict.fromkeys(names)})
        return name

    def chance(self, of: int = 2) -> bool:
        return self.random.randrange(of) == 0

    def number(self, low: int, high: int) -> int:
        return self.random.randint(low, high)

    def shuffled(self, letters: Any) -> Dims:
        letters = [*letters]
        self.random.shuffle(letters)
        return tuple(letters)

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return self.tape.call(target, *args, **kwargs)

    def give(self, name: str, value: torch.Tensor) -> fx.Node:
        places = sum(node.op == "placeholder" for node in self.tape.graph.nodes)
        return self.tape.give(f"l_self_buffers_{name}_{places}", value)

    def size(self, dim: str) -> int:
        return prod(self.sizes[letter] for letter in dim)

    # The whole

    def attention(self, masks: int = 2) -> fx.Node:
        """A patch embedding and one attention; returns [batch, tokens, heads * channels]."""
        x = self.tokens()
        query, key, value = self.projected(x)
        if self.chance(3):
            normed = (self.call(F.layer_norm, part.node, [self.size("d")], eps=0.1) for part in (query, key))
            query, key = (Part(node, part.dims) for node, part in zip(normed, (query, key), strict=True))
        on_query, on_key, self.on_scores = self.pick(
            (1.0, 1.0, 0.3), (0.5, 1.0, None), (1.0, 0.5, None), (0.7, 0.7, None), (1.0, 1.0, None), (0.5, 1.0, 0.4)
        )
        query, key = self.scaled(query, on_query), self.scaled(key, on_key)
        query, key, value = (self.change(*x) for x in (("query", query), ("key", key), ("value", value)))
        scores = self.change("product", self.product(query, key, "d", ("q", "k")))
        weights, total = self.weights(self.change("scores", self.between(scores, masks)))
        weights = self.change("weights", weights)
        if total is None:
            weights = self.after(weights)
        result = self.product(weights, value, "k", ("q", "d"), as_it_lies=total is not None)
        if total is not None:
            result = Part(self.call(self.pick(operator.truediv, torch.div, "div"), result.node, total), result.dims)
        return self.seen(self.change("result", result))

    def tokens(self) -> fx.Node:
        """Draws the sizes; returns the sequence [batch, tokens, width]."""
        grid = self.pick(*GRIDS)
        tokens, groups = prod(grid), self.pick("h", "h", "h", "", "gr")
        self.heads, self.key_heads = groups, self.pick(*{"h": "hh", "": "", "gr": ("gr", "g")}[groups], "")
        if groups == "gr" and not self.key_heads:
            self.key_heads = "g"
        self.sizes |= {letter: self.number(1, 3) for letter in f"b{groups}"}
        self.sizes |= {"q": tokens, "k": tokens, "d": self.pick(2, 3, 5, 8)}
        return self.tape.tokens(self.video(grid))

    def video(self, grid: tuple[int, int, int], name: str = "video") -> fx.Node:
        """A patch embedding; zeros stand for random numbers when the graph is run."""
        self.tape.grid, kind = grid, {"dtype": self.dtype}
        video = self.tape.give(f"l_{name}_", torch.zeros(self.sizes["b"], 1, *grid, **kind))
        weight = self.tape.give(f"l_self_parameters_{name}_", torch.zeros(self.sizes["d"], 1, 1, 1, 1, **kind))
        return self.call(F.conv3d, video, weight)

    def projected(self, x: fx.Node) -> list[Part]:
        """Query, key and value [batch, tokens, heads, channels]."""
        heads = [self.heads, self.key_heads, self.key_heads]
        wide = [self.size(f"{names}d") for names in heads]
        alike = self.heads == self.key_heads
        fused = self.way("projection", "no", *("chunk", "split", "slices", "unbind") * alike)
        if fused == "no":
            nodes = [self.linear(x, size) for size in wide]
        else:
            both = self.linear(x, 3 * wide[0])
            if fused == "slices":
                nodes = [getitem(self.tape, both, (..., slice(i * wide[0], (i + 1) * wide[0]))) for i in range(3)]
            else:
                if fused == "unbind":
                    parts = self.call("unbind", self.call("unflatten", both, 2, (3, wide[0])), 2)
                else:
                    parts = self.call(fused, both, 3 if fused == "chunk" else wide[0], dim=-1)
                nodes = [getitem(self.tape, parts, i) for i in range(3)]
        return [
            self.unfolded(Part(node, ("b", token, f"{names}d")))
            for node, token, names in zip(nodes, "qkk", heads, strict=True)
        ]

    def linear(self, x: fx.Node, size: int) -> fx.Node:
        width = value_of(x).shape[-1]
        return self.call(F.linear, x, self.give("w", torch.randn(size, width).div(width**0.5).to(self.dtype)))

    def seen(self, result: Part) -> fx.Node:
        """The result as [batch, tokens, heads * channels], perhaps through a view that needs its strides."""
        value = value_of(result.node)
        if self.chance(3) and value.is_contiguous():
            node = self.call("view", self.call("view", result.node, -1), *value.shape)
            result = Part(node, result.dims)
        return self.arrange(result, ("b", "q", f"{self.heads}d")).node

    # Dimensions

    def arrange(self, part: Part, dims: Dims) -> Part:
        """The same numbers with other dimensions."""
        if part.dims == dims:
            return part
        part = self.thin(part)
        wide = tuple(dim for dim in dims if dim)
        if set(part.dims) == set(wide):
            part = self.permuted(part, wide)
        else:
            part = self.permuted(self.unfolded(part), tuple("".join(wide)))
            shape = [self.size(dim) for dim in wide]
            if self.chance(3):
                node = self.call("view", self.call("contiguous", part.node), shape)
            else:
                node = self.call(self.pick("reshape", torch.reshape), part.node, shape)
            part = Part(node, wide)
        for place, dim in enumerate(dims):
            if not dim:
                part = Part(self.call("unsqueeze", part.node, place), (*part.dims[:place], "", *part.dims[place:]))
        return part

    def thin(self, part: Part) -> Part:
        """Without the dimensions that are one wide and stand for nothing."""
        for place in reversed(range(len(part.dims))):
            if not part.dims[place]:
                rest = (*part.dims[:place], *part.dims[place + 1 :])
                part = Part(self.call("squeeze", part.node, place), rest)
        return part

    def unfolded(self, part: Part) -> Part:
        """One dimension for each letter."""
        for place, dim in reversed([*enumerate(part.dims)]):
            if len(dim) > 1:
                sizes, value = [self.sizes[letter] for letter in dim], value_of(part.node)
                shape = [*value.shape[:place], *sizes, *value.shape[place + 1 :]]
                spelled = self.way("unfold", "unflatten", "reshape", *("view",) * value.is_contiguous())
                if spelled == "unflatten":
                    node = self.call("unflatten", part.node, place, sizes)
                elif spelled == "view":
                    node = self.call("view", part.node, *shape)
                else:
                    node = self.call(self.pick("reshape", torch.reshape), part.node, shape)
                part = Part(node, (*part.dims[:place], *dim, *part.dims[place + 1 :]))
        return part

    def permuted(self, part: Part, dims: Dims) -> Part:
        moved = [place for place, (old, new) in enumerate(zip(part.dims, dims, strict=True)) if old != new]
        if not moved:
            return part
        if len(moved) == 2 and self.chance():
            first, second = (place - self.pick(0, len(dims)) for place in self.shuffled(moved))
            if {first % len(dims), second % len(dims)} == {len(dims) - 2, len(dims) - 1} and self.chance(4):
                return Part(self.call(getattr, part.node, "mT"), dims)
            return Part(self.call(self.pick("transpose", torch.transpose, "swapaxes"), part.node, first, second), dims)
        order = [part.dims.index(dim) for dim in dims]
        return Part(self.call("permute", part.node, *([order] if self.chance() else order)), dims)

    def refolded(self, part: Part) -> Part:
        """Batch and heads folded or apart, in any order."""
        part = self.unfolded(self.thin(part))
        rest = self.shuffled(dim for dim in part.dims if dim in "qk")
        batch = self.shuffled(f"b{self.heads}")
        return self.arrange(part, (*(("".join(batch),) if self.chance() else batch), *rest))

    # Products

    def product(self, left: Part, right: Part, summed: str, ends: Dims, as_it_lies: bool = False) -> Part:
        """A product of two parts over the letter ``summed``; ``ends`` are what the result has beside batch and heads."""
        if as_it_lies:
            batch, swap = left.dims[:-2], False
        elif self.way("product", "einsum", "matmul") == "einsum":
            return self.einsum(left, right, ends)
        else:
            letters = self.shuffled(f"b{self.heads}")
            cut = self.number(1, len(letters))
            folds = set(letters) <= set("".join(right.dims)) and self.chance()
            batch = tuple(filter(None, ("".join(letters[:cut]), "".join(letters[cut:])))) if folds else letters
            swap = self.chance()
        left, right = self.alike(left, right)
        own = set("".join(right.dims))
        shared = tuple(dim if own >= set(dim) else "" for dim in batch)
        left = self.arrange(left, (*batch, ends[0], summed))
        right = self.arrange(right, (*shared, ends[1], summed))
        if swap:
            left, right, ends = right, left, ends[::-1]
        dims = (*batch, *ends)
        flipped = self.call("transpose", right.node, *self.pick((-2, -1), (-1, -2)))
        flipped = self.call("contiguous", flipped) if self.chance(4) else flipped
        if len(dims) == 3 and shared == batch and self.chance():
            return Part(self.batched(left.node, flipped, summed, dims), dims)
        return Part(self.call(self.pick(operator.matmul, torch.matmul, "matmul"), left.node, flipped), dims)

    def alike(self, *parts: Part) -> list[Part]:
        """Products take one dtype."""
        kinds = {value_of(part.node).dtype for part in parts}
        return [Part(self.call("to", p.node, self.dtype), p.dims) if len(kinds) > 1 else p for p in parts]

    def batched(self, left: fx.Node, right: fx.Node, summed: str, dims: Dims) -> fx.Node:
        if self.way("batched product", "bmm", "baddbmm") == "bmm":
            return self.call(self.pick(torch.bmm, "bmm"), left, right)
        alpha = 1.0
        if summed == "d" and self.on_scores:
            alpha, self.on_scores = self.on_scores, None
        bias = self.call(torch.zeros, [self.size(dim) for dim in dims], dtype=self.dtype)
        return self.call(torch.baddbmm, bias, left, right, beta=0, alpha=alpha)

    def einsum(self, left: Part, right: Part, ends: Dims) -> Part:
        out = self.shuffled((*f"b{self.heads}", *ends))
        parts = [self.unfolded(self.thin(part)) for part in self.alike(left, right)]
        parts = [self.permuted(part, self.shuffled(part.dims)) for part in parts]
        parts = [parts[i] for i in self.shuffled((0, 1))]
        used = sorted({*out, *parts[0].dims, *parts[1].dims})
        named = dict(zip(used, self.shuffled("abcdijkmnXYZ"), strict=False))
        first, second, last = ("".join(named[x] for x in dims) for dims in (parts[0].dims, parts[1].dims, out))
        space = self.pick("", " ")
        equation = f"{first},{space}{second}{space}->{space}{last}"
        nodes = [part.node for part in parts]
        return Part(self.call(torch.einsum, equation, *([nodes] if self.chance() else nodes)), out)

    # Between the products

    def between(self, scores: Part, masks: int) -> Part:
        """Scale, masks, views, casts and shifts of the scores, in any order."""
        steps = ["scale"] * (self.on_scores is not None) + ["mask"] * self.number(0, masks)
        steps += self.random.choices(["view", "same", "shift", "swap"], k=self.number(0, 3))
        for step in self.shuffled(steps):
            if step == "scale":
                scores = self.scaled(scores, self.on_scores)
            elif step == "mask":
                scores = self.mask(scores)
            elif step == "view":
                scores = self.refolded(scores)
            elif step == "swap":
                scores = self.permuted(scores, self.shuffled(scores.dims))
            elif step == "shift":
                scores = Part(self.call(self.pick(operator.add, "sub", "add"), scores.node, 0.5), scores.dims)
            else:
                scores = self.same(scores)
        return scores

    def after(self, weights: Part) -> Part:
        for _ in range(self.number(0, 2)):
            step = self.pick("same", "view", "swap")
            if step == "same":
                weights = self.same(weights)
            elif step == "view":
                weights = self.refolded(weights)
            else:
                weights = self.permuted(weights, self.shuffled(weights.dims))
        return weights

    def scaled(self, part: Part, number: float) -> Part:
        """The part times a number, which is spelled in one of many ways."""
        if number == 1.0:
            return part
        given = ("one", "buffer", "root", *("heads",) * ("h" in part.dims)) * (not self.masked)
        spelled = self.way("scale", "mul", "rmul", "div", "torch", "in place", "made", *given)
        node = part.node
        if spelled == "rmul":
            made = self.call(operator.mul, number, node)
        elif spelled == "div":
            made = self.call(self.pick(operator.truediv, torch.div, "div"), node, 1 / number)
        elif spelled == "torch":
            made = self.call(self.pick(torch.mul, "mul"), node, number)
        elif spelled == "in place":
            made = self.call(self.pick(operator.imul, "mul_"), self.call("clone", node), number)
        elif spelled == "made":
            made = self.call(operator.mul, node, self.call(torch.tensor, number))
        elif spelled == "buffer":
            made = self.call(torch.mul, node, self.give("scale", torch.tensor(number)))
        elif spelled == "root":
            root = self.call(torch.sqrt, self.give("scale", torch.tensor(number**-2)))
            made = self.call(operator.truediv, node, root)
        elif spelled == "one":
            scale = torch.full(self.number(1, len(part.dims)) * (1,), number, dtype=self.dtype)
            made = self.call(operator.mul, *self.shuffled([node, self.give("scale", scale)]))
        elif spelled == "heads":
            shape = [self.sizes["h"] if dim == "h" else 1 for dim in part.dims[part.dims.index("h") :]]
            scales = (number * (1 + torch.rand(shape))).to(self.dtype)
            made = self.call(operator.mul, node, self.give("scales", scales))
        else:
            made = self.call(operator.mul, node, number)
        return Part(made, part.dims)

    def same(self, part: Part) -> Part:
        """Casts, copies and dropout that is not in use: nothing changes."""
        node, kind = part.node, value_of(part.node).dtype
        spelled = self.way("same", "float", "to", "double", "clone", "contiguous", "type_as", "dropout")
        if spelled == "to":
            node = self.call("to", node, torch.float32)
        elif spelled == "double":
            node = self.call("to", self.call("double", node), kind)
        elif spelled == "type_as":
            node = self.call("type_as", self.call("double", node), node)
        elif spelled == "dropout":
            node = self.call(F.dropout, node, *self.pick((0.0, True), (0.1, False)))
        else:
            node = self.call(spelled, node)
        return Part(node, part.dims)

    def mask(self, scores: Part) -> Part:
        """One of many spellings of a bool mask [batch, keys] or [keys], True where a key is attended."""
        scores, aligned = self.aligned(scores, self.pick("bk", "k"))
        return Part(MASKS[self.way("mask", *MASKS)](self, scores.node, aligned), scores.dims)

    def aligned(self, scores: Part, letters: str) -> tuple[Part, fx.Node]:
        """The scores, and a bool mask over those letters that can be broadcast to them; every row keeps a key."""
        self.masked = True
        if any("b" in dim and dim != "b" for dim in scores.dims):  # it would have to be repeated for every head
            scores = self.unfolded(scores)
        keep = torch.rand([self.sizes[letter] for letter in letters]) > 0.4
        keep[..., 0], keep[..., 1] = True, False
        dims = tuple(dim if dim and dim in letters else "" for dim in scores.dims)
        mask = self.arrange(Part(self.give("mask", keep), tuple(letters)), dims).node
        while not dims[0] and self.chance():  # leading dimensions of size one may be left out
            mask, dims = getitem(self.tape, mask, 0), dims[1:]
        return scores, mask

    def low(self) -> float:
        return self.pick(-torch.inf, -1e9, torch.finfo(self.dtype).min)

    # The softmax

    def weights(self, scores: Part) -> tuple[Part, fx.Node | None]:
        """The weights, and the sum that the result must be divided by where the weights are not."""
        dim, rank = scores.dims.index("k"), len(scores.dims)
        dim, node = dim - self.pick(0, rank), scores.node
        apart = self.key_heads == self.heads or all(len(dim) == 1 for dim in scores.dims)
        late = ("exp late",) * (self.late and apart and scores.dims[-2:] == ("q", "k"))
        spelled = self.way("softmax", "function", "torch", "method", "dtype", "logsumexp", "exp", *late)
        if spelled == "function":
            node = self.call(F.softmax, node, dim=dim)
        elif spelled == "torch":
            node = self.call(torch.softmax, node, dim)
        elif spelled == "method":
            node = self.call("softmax", node, dim)
        elif spelled == "dtype":
            node = self.call(F.softmax, node, dim=dim, dtype=self.pick(torch.float32, torch.float64))
        elif spelled == "logsumexp":
            total = self.call(torch.logsumexp, node, dim, keepdim=True)
            node = self.call(torch.exp, self.call(operator.sub, node, total))
        else:
            exp = self.call(self.pick(torch.exp, "exp"), self.shifted(node, dim))
            total = self.call("sum", exp, self.pick(dim, [dim]), keepdim=True)
            if spelled == "exp late":
                return Part(exp, scores.dims), total
            node = self.call(self.pick(operator.truediv, torch.div), exp, total)
        return Part(node, scores.dims), None

    def shifted(self, node: fx.Node, dim: int) -> fx.Node:
        spelled = self.way("peak", "amax", "max", "detached", *("none",) * (not self.masked))
        if spelled == "none":
            return node
        if spelled == "max":
            pair = self.call(torch.max, node, dim, keepdim=True)
            peak = self.call(getattr, pair, "values") if self.chance() else getitem(self.tape, pair, 0)
        else:
            peak = self.call("amax", node, dim, keepdim=True)
        if spelled == "detached":
            peak = self.call("detach", peak)
        return self.call(self.pick(operator.sub, torch.sub), node, peak)
