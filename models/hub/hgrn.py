"""FLA's HGRN (arXiv 2311.04823) and HGRN2 (arXiv 2404.07904), whose decays have learned lower bounds."""

from collections.abc import Mapping
from typing import Any, ClassVar

from models.config import HGRN2Config, ModelConfig
from models.hub.fla_family import FlaFamily
from models.hub.values import optional_whole, whole


class _Bounded(FlaFamily):
    """A model with one tensor of bounds for all layers."""

    without: ClassVar[Mapping[str, tuple[Any, ...]]] = {**FlaFamily.without, "use_lower_bound": (True, None)}

    def require(self, model: ModelConfig) -> None:
        """Check that FLA's model can compute a model. The bound of layer 0 is 0, so that it alone needs no tensor."""
        super().require(model)
        self.refuse(not model.bounded_layers(), f"{self.mixer} in layer 0 alone")


class HGRN(_Bounded):
    """FLA's HGRNForCausalLM."""

    model_type: ClassVar = "hgrn"
    architecture: ClassVar = "HGRNForCausalLM"
    mixer: ClassVar = "hgrn"
    without: ClassVar = {**_Bounded.without, "expand_ratio": (1, None)}

    def write(self, model: ModelConfig) -> dict[str, Any]:
        """The architecture's own keys of config.json."""
        return super().write(model) | {"expand_ratio": 1, "use_lower_bound": True}


class HGRN2(_Bounded):
    """FLA's HGRN2ForCausalLM."""

    model_type: ClassVar = "hgrn2"
    architecture: ClassVar = "HGRN2ForCausalLM"
    mixer: ClassVar = "hgrn2"
    represented: ClassVar = (*FlaFamily.represented, "expand_ratio")

    def settings(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The section of the linear mixer. `expand_ratio` is the size of a head, and follows from num_heads.

        Raises:
            ValueError: the two disagree.
        """
        width = whole(config, "hidden_size")
        heads = optional_whole(config, "num_heads")
        # A missing key has FLA's default; null asks for what num_heads gives.
        size = optional_whole(config, "expand_ratio", 128) or width // (heads or 1)
        if heads is not None and heads * size != width:
            raise ValueError(f"expand_ratio={size} is not hidden_size={width} over num_heads={heads}; correct it")
        return {"hgrn2": HGRN2Config(head_dim=size)}

    def write(self, model: ModelConfig) -> dict[str, Any]:
        """The architecture's own keys of config.json."""
        size = model.hgrn2.head_dim
        keys = {"num_heads": model.hidden_size // size, "expand_ratio": size, "use_lower_bound": True}
        return super().write(model) | keys
