"""Notes on the engines that can read a folder in PEFT's format."""

from __future__ import annotations

from collections.abc import Sequence

_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values of vLLM's ``--max-lora-rank`` (vllm/config/lora.py, MaxLoRARanks)."""
_VLLM_DEFAULT = 16


def engine_notes(layout: str, rank: int, size: int, ragged_size: int, saved: Sequence[str], experts: bool) -> list[str]:
    """Notes for card and terminal.

    Args:
        layout: ``padded`` or ``ragged``.
        rank: The largest rank in the folder.
        size: Bytes of A and B as written.
        ragged_size: Bytes of A and B in the layout ragged.
        saved: The modules that are saved whole.
        experts: Whether weights of experts are adapted.
    """
    if layout == "ragged":
        notes = [
            "Each layer has its own rank: for PEFT and transformers only. llama.cpp (and ollama, LM Studio) divides "
            "lora_alpha by the rank of each tensor, which makes layers of smaller ranks too strong. TGI drops a "
            "projection that one layer lacks. Export with layout padded for them."
        ]
    else:
        notes = [f"Every adapted layer has rank {rank}, and scale 1 in vLLM, llama.cpp, TGI, PEFT and transformers."]
        if ragged_size < size:
            smaller = f"the layout ragged, for PEFT and transformers only, would take {ragged_size:,}."
            notes[0] += f" A and B take {size:,} bytes; {smaller}"
    if rank > _VLLM_DEFAULT:
        needed = next((r for r in _VLLM_RANKS if r >= rank), None)
        notes.append(
            f"vLLM loads rank {rank} with --max-lora-rank {needed} (its default is {_VLLM_DEFAULT})."
            if needed
            else f"vLLM loads ranks up to {_VLLM_RANKS[-1]}, and this is {rank}."
        )
    if experts:
        notes.append(
            "The weights of experts are in target_parameters, for PEFT (0.19 or later) and transformers: serve the "
            "format merged in other engines."
        )
        if layout == "ragged":
            notes[-1] += " PEFT 0.21 warns that it ignores their ranks in rank_pattern, but it uses them."
    if saved:
        notes.append(
            f"Trained whole and in modules_to_save: {', '.join(saved)}. PEFT and transformers load them. vLLM refuses "
            "them (since August 2026 it takes score and classifier), llama.cpp's converter stops, TGI ignores them: "
            "serve the format merged there, or train with train_head false."
        )
    return notes
