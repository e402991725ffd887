"""The predictors of Dynamic-LLaVA: small networks that say of a token whether it is worth keeping."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pruneops import ops
from pruneops.methods.mod_layer import check_finite
from pruneops.ragged import cu_seqlens_of, to_device

#: The predictors' names in a text model, in the order of their draws.
IMAGE, OUTPUT_TEXT, INSTRUCT = "image_score_predictor", "output_text_score_predictor", "instruct_score_predictor"
#: The columns of a predictor's logits.
KEEP, DROP = 0, 1


def gumbel_noise(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Float32 draws of the standard Gumbel distribution, from the device's random generator."""
    return -torch.empty(shape, dtype=torch.float32, device=device).exponential_().log()


class Predictor(nn.Module):
    """What the predictors share: the draw of a decision in training.

    Attributes
    ----------
    gumbel_tau : float
        Temperature of the draws; not saved with the weights.
    noise : callable
        ``noise(shape, device)`` gives the float32 Gumbel noise of a draw; tests put their own here.
    """

    #: The name of the method that these modules belong to.
    of_method = "dynamic_llava"

    def __init__(self) -> None:
        super().__init__()
        self.gumbel_tau = 1.0
        self.noise: Callable[[tuple[int, ...], torch.device], Tensor] = gumbel_noise

    def initialise(self, std: float) -> None:
        """Weights normal with a standard deviation, biases 0, layer norms the identity."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, 0.0, std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)

    def draw(self, logits: Tensor) -> Tensor:
        """A straight-through Gumbel draw: ``(tokens,)`` float32, 1 keep or 0 drop up to rounding.

        Its gradient is that of the softmax at temperature `gumbel_tau` of the log-probabilities plus noise.

        Parameters
        ----------
        logits : Tensor
            ``(tokens, 2)``.
        """
        logits = logits.float().log_softmax(-1)
        soft = ((logits + self.noise(tuple(logits.shape), logits.device)) / self.gumbel_tau).softmax(-1)[:, KEEP]
        hard = (soft.detach() >= 0.5).to(soft.dtype)
        return hard - soft.detach() + soft

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        check_finite((name, value) for name, value in state_dict.items() if name.startswith(prefix))
        super()._load_from_state_dict(state_dict, prefix, *args)


def predictors_of(text_model: nn.Module) -> dict[str, Predictor]:
    """The predictors of a text model by name, in the order of their draws."""
    return {name: getattr(text_model, name) for name in (IMAGE, OUTPUT_TEXT, INSTRUCT) if hasattr(text_model, name)}


class TextPredictor(Predictor):
    """Judges every text token by itself.

    Parameters
    ----------
    hidden_size, d_model : int
        Widths of the token and of the first hidden layer.
    """

    def __init__(self, hidden_size: int, d_model: int, **factory: Any) -> None:
        super().__init__()
        self.output_mlp = nn.Sequential(
            nn.LayerNorm(hidden_size, **factory),
            nn.Linear(hidden_size, d_model, **factory),
            nn.GELU(),
            nn.Linear(d_model, d_model // 2, **factory),
            nn.GELU(),
            nn.Linear(d_model // 2, d_model // 4, **factory),
            nn.GELU(),
            nn.Linear(d_model // 4, 2, **factory),
        )

    def forward(self, x: Tensor) -> Tensor:
        """``(tokens, hidden)`` to ``(tokens, 2)`` logits: keep, drop."""
        return self.output_mlp(x)

    def keeps(self, x: Tensor) -> Tensor:
        """``(tokens,)`` bool: which of ``(tokens, hidden)`` to keep; at equal logits and at NaN: drop."""
        logits = self(x)
        return logits[:, KEEP] > logits[:, DROP]


class ImagePredictor(Predictor):
    """Judges the image tokens of a row together.

    Parameters
    ----------
    hidden_size, d_model : int
        Widths of the token and of the blocks.
    nhead, dim_feedforward, num_layers : int
        Attention heads, hidden width of the MLP, and number of the blocks.
    """

    def __init__(
        self, hidden_size: int, d_model: int, nhead: int, dim_feedforward: int, num_layers: int, **factory: Any
    ) -> None:
        super().__init__()
        self.down_mlp = nn.Sequential(
            nn.LayerNorm(hidden_size, **factory), nn.Linear(hidden_size, d_model, **factory), nn.GELU()
        )
        self.transformer = nn.ModuleList(_Block(d_model, nhead, dim_feedforward, **factory) for _ in range(num_layers))
        self.output_mlp = nn.Sequential(
            nn.Linear(d_model, d_model // 2, **factory),
            nn.GELU(),
            nn.Linear(d_model // 2, d_model // 4, **factory),
            nn.GELU(),
            nn.Linear(d_model // 4, 2, **factory),
        )

    def forward(self, x: Tensor, counts: list[int]) -> Tensor:
        """Logits of the image tokens of some rows.

        Parameters
        ----------
        x : Tensor
            ``(tokens, hidden)``, the rows one behind the other.
        counts : list of int
            Tokens of each row; 0 is allowed.

        Returns
        -------
        Tensor
            ``(tokens, 2)`` logits: keep, drop.
        """
        cu_seqlens, longest = cu_seqlens_of(counts, x.device), max(counts, default=0)
        x = self.down_mlp(x)
        for block in self.transformer:
            x = block(x, cu_seqlens, longest)
        half = x.shape[1] // 2
        whole = _RowMeans.apply(x[:, half:], to_device(torch.tensor(counts, dtype=torch.int64), x.device), counts)
        return self.output_mlp(torch.cat([x[:, :half], whole], dim=1))


class _Block(nn.Module):
    """A pre-norm transformer block over packed rows, every token of a row seeing all of it."""

    def __init__(self, d_model: int, nhead: int, dim_feedforward: int, **factory: Any) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(d_model, **factory)
        self.attn = _Attention(d_model, nhead, **factory)
        self.norm2 = nn.LayerNorm(d_model, **factory)
        self.mlp = _MLP(d_model, dim_feedforward, **factory)

    def forward(self, x: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
        x = x + self.attn(self.norm1(x), cu_seqlens, longest)
        return x + self.mlp(self.norm2(x))


class _Attention(nn.Module):
    def __init__(self, d_model: int, nhead: int, **factory: Any) -> None:
        super().__init__()
        self.nhead = nhead
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=False, **factory)
        self.proj = nn.Linear(d_model, d_model, **factory)

    def forward(self, x: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
        q, k, v = self.qkv(x).view(x.shape[0], 3, self.nhead, x.shape[1] // self.nhead).unbind(1)
        out = ops.varlen_attention(q, k, v, cu_seqlens, cu_seqlens, longest, longest, causal=False)
        return self.proj(out.flatten(1))


class _MLP(nn.Module):
    def __init__(self, d_model: int, dim_feedforward: int, **factory: Any) -> None:
        super().__init__()
        self.fc1 = nn.Linear(d_model, dim_feedforward, **factory)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(dim_feedforward, d_model, **factory)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class _RowMeans(torch.autograd.Function):
    """Gives every token ``(tokens, d)`` the mean over its row. The map is symmetric, so its gradient is itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, lengths: Tensor, counts: list[int]) -> Tensor:
        ctx.lengths, ctx.counts = lengths, counts
        return _row_means(x, lengths, counts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _row_means(grad.contiguous(), ctx.lengths, ctx.counts), None, None


def _row_means(x: Tensor, lengths: Tensor, counts: list[int]) -> Tensor:
    if not x.shape[0]:
        return torch.zeros_like(x)
    sums = torch.segment_reduce(x.float(), "sum", lengths=lengths, axis=0, unsafe=True)
    means = (sums / lengths.clamp(min=1).unsqueeze(1)).to(x.dtype)
    return means.repeat_interleave(lengths, dim=0, output_size=sum(counts))
