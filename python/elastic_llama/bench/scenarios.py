"""What is decoded: prompts of text and images, for one sequence or several."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import ConfigError, message

N_IMAGE = 576  # cells of one LLaVA-1.5 image: 336 pixels, patches of 14


@dataclass(frozen=True)
class Scenario:
    """Prompts as in use, with tokens that mean nothing.

    Attributes
    ----------
    n_text : int
        Tokens of text in each prompt: half before the images, half behind them.
    images : tuple of int
        Cells of each image.
    n_seqs : int
        Sequences, each with a prompt of its own, that generate side by side.
    n_gen : int
        Tokens that each sequence generates.
    n_parts : int
        Parts that generation is cut into: stock, elastic and ideal take turns after each.
    kv_cells : int, optional
        Hard cap of the elastic cache.
    """

    name: str
    about: str
    n_text: int
    images: tuple[int, ...] = ()
    n_seqs: int = 1
    n_gen: int = 160
    n_parts: int = 5
    kv_cells: int | None = None

    @property
    def n_prompt(self) -> int:
        """Tokens of one prompt."""
        return self.n_text + sum(self.images)


SCENARIOS = (
    Scenario("image", "one image, 576 cells, and 64 tokens of text", 64, (N_IMAGE,)),
    Scenario("hires", "one image in five tiles, 2880 cells, and 64 tokens", 64, (5 * N_IMAGE,)),
    Scenario("images8", "eight images and 256 tokens", 256, (N_IMAGE,) * 8),
    Scenario("images8-capped", "the same in 1024 cells", 256, (N_IMAGE,) * 8, kv_cells=1024),
    Scenario("text", "a text of 1024 tokens", 1024),
    Scenario("seqs8", "8 sequences of 1024 + 512 tokens", 1024, (), 8, 512, 8),
    Scenario("seqs16", "16 sequences of 1024 + 512 tokens", 1024, (), 16, 512, 8),
)


def find_scenarios(names: str) -> list[Scenario]:
    """Scenarios by name, separated by commas.

    Raises
    ------
    ConfigError
        A name is not in the list.
    """
    known = {s.name: s for s in SCENARIOS}
    chosen = [name.strip() for name in names.split(",") if name.strip()]
    for name in chosen or [""]:
        if name not in known:
            raise ConfigError(
                message("bench", "scenario", repr(name), "one of " + ", ".join(known))
            )
    return [known[name] for name in chosen]
