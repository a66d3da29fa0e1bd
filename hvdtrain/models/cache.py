"""What decoding keeps of the tokens it has seen: their keys and values, shared by the branches of a row.

A row is one input: first its prompt, padded at the end to the longest, then at every step one token of each branch
(a beam). A token lies in a slot; which slots a branch sees is a table. So branches share what they have in common, and
are reordered by reordering the table: keys and values stay where they are. Where room ends, slots that no branch sees
any more are dropped, and only if that is not enough the room grows.

    prompt a b c and one place of padding; two branches go on with d and e; then both go on from e, with f and g

    slot       a b c . d e f g
    branch 0   x x x     x x        a b c e f
    branch 1   x x x     x   x      a b c e g         d will be dropped

Shape letters:  L layers, B rows, N branches of a row, T new tokens of a row, S slots, G heads of keys and values,
                K width of a head
"""

import torch


class Cache:
    """Of a model, or of a stage of one. ``length``: slots in use. ``positions_BS``: where in its text a slot's token
    stands.

    ``memory``: keys and values of an encoder's output, [L, 2, B, G, source positions, K], where there is one, and
    ``memory_mask``, bool [B, 1, 1, source positions]; the branches of a row share them too.
    """

    def __init__(
        self,
        like: torch.Tensor,
        layers: int,
        heads: int,
        head_width: int,
        window: int = 0,
        lengths_B: torch.Tensor | None = None,
    ):
        """like: a weight, for type and device. layers: those that are here. window: how many positions attention sees;
        0: all.

        lengths_B: int64, of the prompts, at least 1; None: all alike.
        """
        self._like, self._window, self._lengths_B = like, window, lengths_B
        self._keys_values = like.new_empty(layers, 2, 0, 0, heads, head_width)  # [L, 2, B, S, G, K]
        self.length = 0
        self.memory: torch.Tensor | None = None
        self.memory_mask: torch.Tensor | None = None
        self._all_seen = lengths_B is None

    def place(self, rows: int, tokens: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Slots for the prompts, padded to ``tokens``, or later for one more token of each of so many branches.

        Returns the positions of these tokens, int64 [B, T], and which slots they see, bool [B, 1, T, S], their own
        included. None: 0 to T - 1; None: all, of prompts those before.
        """
        if not self.length:
            self._begin(rows, tokens)
            return None, None
        assert self._seen_BNS.shape[:2] == (rows, tokens), "one token for each branch"
        return self._go_on()

    def _begin(self, rows: int, positions: int) -> None:
        layers, pair, _, _, heads, width = self._keys_values.shape
        device, room = self._like.device, positions + 64
        self._keys_values = self._like.new_empty(layers, pair, rows, room, heads, width)
        self.positions_BS = torch.arange(room, device=device).repeat(rows, 1)
        same = torch.full((rows,), positions, device=device)
        self._next_B = same if self._lengths_B is None else self._lengths_B
        self._seen_BNS = (self.positions_BS < self._next_B[:, None])[:, None]
        self.length = positions

    def _go_on(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        branches = self._seen_BNS.shape[1]
        self._make_room(branches)
        begin, self.length = self.length, self.length + branches
        positions_BN = self._next_B[:, None].expand(-1, branches)
        self.positions_BS[:, begin : self.length] = positions_BN
        self._seen_BNS[:, :, begin : self.length] = torch.eye(branches, dtype=torch.bool, device=self._like.device)
        self._next_B = self._next_B + 1
        if self._window:
            near_BS = self.positions_BS >= (self._next_B - self._window)[:, None]
            self._seen_BNS &= near_BS[:, None]
            self._all_seen = self._all_seen and self.length <= self._window
        return positions_BN, None if self._all_seen else self._seen_BNS[:, None, :, : self.length]

    def append(self, layer: int, keys_BGTK: torch.Tensor, values_BGTK: torch.Tensor) -> torch.Tensor:
        """Store a layer's keys and values of the newest slots; returns those of all slots, [2, B, G, S, K]."""
        begin = self.length - keys_BGTK.shape[2]
        kept = self._keys_values[layer]
        kept[0, :, begin : self.length] = keys_BGTK.transpose(1, 2)
        kept[1, :, begin : self.length] = values_BGTK.transpose(1, 2)
        return kept[:, :, : self.length].transpose(2, 3)

    def branch(self, parents_BN: torch.Tensor) -> None:
        """Branch n of a row goes on from what its branch ``parents_BN[b, n]`` has seen (int64)."""
        self._seen_BNS = self._seen_BNS.gather(1, parents_BN[:, :, None].expand(-1, -1, self._seen_BNS.shape[2]))
        self._all_seen = self._all_seen and parents_BN.shape[1] == 1

    def select(self, rows: torch.Tensor) -> None:
        """Keep these rows alone, in this order: int64."""
        self._keys_values = self._keys_values.index_select(2, rows)
        self.positions_BS, self._seen_BNS, self._next_B = (
            x.index_select(0, rows) for x in (self.positions_BS, self._seen_BNS, self._next_B)
        )
        if self.memory is not None and self.memory_mask is not None:
            self.memory, self.memory_mask = self.memory.index_select(2, rows), self.memory_mask.index_select(0, rows)

    def _make_room(self, tokens: int) -> None:
        room = self._keys_values.shape[3]
        if self.length + tokens <= room:
            return
        alive_BS = self._seen_BNS[:, :, : self.length].any(1)
        kept = int(alive_BS.sum(1).max())
        slots_BS = (~alive_BS).byte().argsort(dim=1, stable=True)[:, :kept]  # the living, in their order
        room = max(room, 3 * (kept + tokens) // 2)  # so that many are appended before the next time
        old = self._keys_values
        layers, pair, rows, before, heads, width = old.shape
        self._keys_values = old.new_empty(layers, pair, rows, room, heads, width)
        firsts = torch.arange(0, layers * pair * rows * before, before, device=old.device)
        places = (firsts.view(-1, rows, 1) + slots_BS).flatten()  # of whole slots, laid end to end
        self._keys_values[:, :, :, :kept] = (
            old.flatten(0, 3).index_select(0, places).view(layers, pair, rows, kept, heads, width)
        )
        positions_BS, seen_BNS = self.positions_BS, self._seen_BNS
        self.positions_BS = positions_BS.new_zeros(rows, room)
        self.positions_BS[:, :kept] = positions_BS.gather(1, slots_BS)
        self._seen_BNS = seen_BNS.new_zeros(rows, seen_BNS.shape[1], room)
        self._seen_BNS[:, :, :kept] = seen_BNS.gather(2, slots_BS[:, None].expand(-1, seen_BNS.shape[1], -1))
        self.length = kept


class LayerCache:
    """A layer's part of a ``Cache``."""

    def __init__(self, whole: Cache, layer: int):
        self.whole, self._layer = whole, layer

    def append(self, keys_BGTK: torch.Tensor, values_BGTK: torch.Tensor) -> torch.Tensor:
        """See ``Cache.append``."""
        return self.whole.append(self._layer, keys_BGTK, values_BGTK)

    @property
    def memory(self) -> torch.Tensor:
        """Keys and values of the encoder's output: [2, B, G, source positions, K]."""
        assert self.whole.memory is not None, "read a source first"
        return self.whole.memory[self._layer]
