"""The user branch of every cross-attention of a UNet, installed and removed without a trace.

``Attention(q, K_text, V_text) + user_scale * Attention(q, K_user, V_user)`` (method step 4; the decoupled
cross-attention of arXiv 2308.06721, eq. 5). The trained weights live in :class:`UserAttention`, outside the
UNet, whose own state stays as it was. Keys and values of the user are computed once per image there, and
the processors read them at every denoising step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prefgen.errors import ConfigError, DataError
from prefgen.models.user_schedule import layer_factors

CROSS_ATTENTION = "attn2.processor"
"""How diffusers names the processors that read the text."""


class UserKeyValue(nn.Module):
    """``to_k_user`` and ``to_v_user`` of one cross-attention, begun as copies of the frozen text ones."""

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.heads = int(attention.heads)
        self.to_k_user = _copy_linear(attention.to_k)
        self.to_v_user = _copy_linear(attention.to_v)

    def forward(self, user_embeds: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B,heads,N,Dhead) of user tokens (B,N,Dcross)."""
        key, value = self.to_k_user(user_embeds), self.to_v_user(user_embeds)
        return self._split(key), self._split(value)

    def _split(self, states: Tensor) -> Tensor:
        return states.view(*states.shape[:2], self.heads, -1).transpose(1, 2)


class _Users:
    """What the processors read: the users now drawn for, shared by all layers of one UNet."""

    def __init__(self) -> None:
        self.scale: Tensor | None = None  # as it was set
        self.step_factor = 1.0
        self.layer_factors: tuple[float, ...] = ()
        self.all_on = False
        self.keys_and_values: list[tuple[Tensor, Tensor]] = []

    def scale_at(self, index: int) -> Tensor | None:
        """(B,1,1) of one layer at the present step; None where it is the base model's."""
        factor = self.step_factor * self.layer_factors[index] if self.layer_factors else self.step_factor
        if self.scale is None or factor == 0:
            return None
        return self.scale if factor == 1 else self.scale * factor


class UserAttnProcessor:
    """Cross-attention over the text and, beside it, over the user's tokens.

    Not a Module on purpose: as one it would enter the UNet's state dict and its parameters.
    With every ``user_scale`` at 0 the original processor does the work, so the UNet is the base model bit
    for bit; in a mixed batch the rows at 0 take the text branch's numbers untouched.
    """

    def __init__(self, base: Any, *, users: _Users, index: int) -> None:
        self.base = base
        self.users = users
        self.index = index

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """As ``AttnProcessor2_0``: hidden states (B,S,D) or (B,D,H,W) in, the same out."""
        scale = self.users.scale_at(self.index)
        if scale is None:
            return cast(
                Tensor,
                self.base(attn, hidden_states, encoder_hidden_states, attention_mask, temb, *args, **kwargs),
            )
        residual, shape = hidden_states, hidden_states.shape
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        if hidden_states.ndim == 4:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        if attn.norm_cross and encoder_hidden_states is not None:
            text = attn.norm_encoder_hidden_states(text)
        query, key, value = (
            project(states).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for project, states in ((attn.to_q, hidden_states), (attn.to_k, text), (attn.to_v, text))
        )
        mask = _text_mask(attn, attention_mask, batch_size=len(text), num_tokens=text.shape[1])
        text_out = _attend(query, key, value, mask=mask)
        out = attn.to_out[1](attn.to_out[0](self._add_user(text_out, query=query, scale=scale)))
        if len(shape) == 4:
            out = out.transpose(-1, -2).reshape(shape)
        if attn.residual_connection:
            out = out + residual
        return cast(Tensor, out / attn.rescale_output_factor)

    def _add_user(self, text_out: Tensor, *, query: Tensor, scale: Tensor) -> Tensor:
        key, value = self.users.keys_and_values[self.index]
        if len(key) != len(query):
            raise DataError(
                f"users for {len(key)} rows, but the UNet was called with {len(query)}; with "
                "classifier-free guidance the unconditional rows come first and need tokens too"
            )
        user_out = _attend(query, key.to(query.dtype), value.to(query.dtype))
        # Scaled in float32 and rounded once, as a Python number times a half-precision tensor is.
        both = text_out + (user_out * scale).to(text_out.dtype)
        return both if self.users.all_on else torch.where(scale == 0, text_out, both)


class UserAttention(nn.Module):
    """All user branches of one UNet: their weights, and the switch.

    Attributes:
        names: the processors' names in the UNet's order, one per layer.
        layers: ``to_k_user`` and ``to_v_user`` of each.
    """

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.names = tuple(name for name in unet.attn_processors if name.endswith(CROSS_ATTENTION))
        modules = dict(unet.named_modules())
        attentions = [modules[name.removesuffix(".processor")] for name in self.names]
        self.layers = nn.ModuleList(UserKeyValue(attention) for attention in attentions)
        self._users = _Users()
        # In a tuple, so that nn.Module does not adopt the frozen UNet as a child and save it.
        self._unet = (unet,)
        self._installed: dict[str, Any] | None = None
        self._switch: Callable[[bool], object] | None = None

    def follow(self, switch: Callable[[bool], object]) -> None:
        """Call ``switch`` with whether users are drawn for, now and whenever that changes."""
        self._switch = switch
        switch(self._users.scale is not None)

    @property
    def branches(self) -> list[UserKeyValue]:
        """``layers``, typed."""
        return [cast(UserKeyValue, layer) for layer in self.layers]

    @property
    def installed(self) -> bool:
        """Whether the UNet now holds the processors."""
        return self._installed is not None

    def install(self) -> UserAttention:
        """Put the processors in; until users are set the UNet computes what it did before.

        Raises:
            ConfigError: a cross-attention uses another processor than diffusers' default one.
        """
        if self.installed:
            return self
        processors = dict(self._unet[0].attn_processors)
        users = {
            name: UserAttnProcessor(processors[name], users=self._users, index=index)
            for index, name in enumerate(self.names)
        }
        for name in self.names:
            kind = type(processors[name]).__name__
            if kind != "AttnProcessor2_0":
                raise ConfigError(
                    f"{name} is {kind}, but the user branch needs AttnProcessor2_0; unload other adapters "
                    "or call unet.set_default_attn_processor() first"
                )
        self._unet[0].set_attn_processor({**processors, **users})
        self._installed = processors
        return self

    def remove(self) -> None:
        """Give the UNet its own processors back: the very objects it had."""
        if self._installed is not None:
            self._unet[0].set_attn_processor(dict(self._installed))
            self._installed = None
        self.clear()

    def set(
        self,
        user_embeds: Tensor,
        *,
        user_scale: float | Sequence[float] | Tensor = 1.0,
        block_scales: Mapping[str, float] | None = None,
    ) -> None:
        """Draw for these users from now on; keys and values are computed here, once.

        Training must leave them set until after the backward pass: with gradient checkpointing the UNet runs
        a second time there, and cleared users would let it take another path than it took before.

        Args:
            user_embeds: (B,N,Dcross), one row per row of the UNet's batch.
            user_scale: one number, or one per row; 0 is the base model.
            block_scales: factor on it by block, see :func:`layer_factors`; None is 1 everywhere.

        Raises:
            DataError: the numbers of rows and scales differ, a scale is not finite, or no such block.
        """
        factors = layer_factors(self.names, blocks=block_scales) if block_scales else ()
        scale = torch.as_tensor(user_scale, dtype=torch.float32).detach().cpu()
        scale = scale.expand(len(user_embeds)) if scale.ndim == 0 else scale
        if scale.shape != (len(user_embeds),):
            raise DataError(
                f"{scale.numel()} user scales for {len(user_embeds)} users; give one, or one for each"
            )
        if not bool(scale.isfinite().all()):
            raise DataError(f"user_scale must be finite, got {scale.tolist()}")
        if not bool(scale.any()):
            self.clear()
            return
        self._users.all_on = bool((scale != 0).all())
        self._users.scale = scale.to(user_embeds.device).view(-1, 1, 1)
        self._users.step_factor, self._users.layer_factors = 1.0, factors
        self._users.keys_and_values = [layer(user_embeds) for layer in self.layers]
        if self._switch is not None:
            self._switch(True)

    def rescale(self, factor: float) -> None:
        """From the next step on every ``user_scale`` is what was set, times this; keys and values stay."""
        self._users.step_factor = float(factor)

    def clear(self) -> None:
        """No users: the base model."""
        self._users.scale = None
        self._users.keys_and_values = []
        if self._switch is not None:
            self._switch(False)

    @contextlib.contextmanager
    def conditioned(
        self, user_embeds: Tensor, *, user_scale: float | Sequence[float] | Tensor = 1.0
    ) -> Iterator[None]:
        """:meth:`set` for the length of a ``with`` block (inference)."""
        self.set(user_embeds, user_scale=user_scale)
        try:
            yield
        finally:
            self.clear()


def install(unet: Any) -> UserAttention:
    """User attention for a UNet, begun from its frozen text projections, and installed in it."""
    return UserAttention(unet).install()


def _attend(query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor | None = None) -> Tensor:
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=0.0, is_causal=False)
    return out.transpose(1, 2).flatten(2).to(query.dtype)


def _text_mask(attn: Any, mask: Tensor | None, *, batch_size: int, num_tokens: int) -> Tensor | None:
    if mask is None:
        return None
    mask = attn.prepare_attention_mask(mask, num_tokens, batch_size)
    return mask.view(batch_size, attn.heads, -1, mask.shape[-1])


def _copy_linear(linear: Any) -> nn.Linear:
    weight = linear.weight.detach()
    # Built on meta: drawing weights that are replaced at once would move the global random state.
    copy = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    # float32 whatever the frozen dtype: steps of 1e-4 vanish in bfloat16 weights.
    copy.weight = nn.Parameter(weight.float().clone())
    return copy
