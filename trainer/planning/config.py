"""The configuration of a plan: a pre-training run and a cluster. Imports neither torch nor megatron."""

from dataclasses import dataclass, field, replace

from models.config.checks import require
from trainer.config import PretrainConfig


@dataclass
class ClusterConfig:
    """The cluster that a run is planned for. GB are 10^9 bytes, TFLOPs are 10^12 operations per second.

    Attributes:
        name: Name of the cluster in the report.
        nodes: Number of machines.
        devices: Devices per machine; each rank has one.
        memory: Memory of a device, GB.
        usable: Share of that memory for parameters, gradients, optimizer states and activations. The rest is for the
            runtime, message buffers, short-lived tensors and fragmentation.
        host_memory: Host memory per machine for offloaded states, GB.
        peak_bf16: Dense bf16 peak of a device, TFLOPs.
        peak_fp32: Dense peak with fp32 operands, TFLOPs (TF32 where the models use it).
        efficiency: Share of the peak that the model's operations reach while a device computes.
        intra_node: Bandwidth of a device to others of its machine, GB/s, one way.
        inter_node: Bandwidth of a device to other machines, GB/s, one way.
    """

    name: str = "laptop"
    nodes: int = 1
    devices: int = 2
    memory: float = 4.0
    usable: float = 0.9
    host_memory: float = 16.0
    peak_bf16: float = 0.2
    peak_fp32: float = 0.1
    efficiency: float = 0.4
    intra_node: float = 2.0
    inter_node: float = 0.1

    def __post_init__(self) -> None:
        positive = ("nodes", "devices", "memory", "host_memory", "peak_bf16", "peak_fp32", "intra_node", "inter_node")
        for name in positive:
            value = getattr(self, name)
            require(value > 0, f"cluster.{name} is {value}: it must be positive")
        for name in ("usable", "efficiency"):
            value = getattr(self, name)
            require(0 < value <= 1, f"cluster.{name} is {value}: it is a share, more than 0 and at most 1")

    @property
    def ranks(self) -> int:
        """Number of devices in the cluster."""
        return self.nodes * self.devices

    @property
    def budget(self) -> float:
        """Bytes of device memory that a plan may use."""
        return self.memory * self.usable * 1e9

    def peak(self, precision: str) -> float:
        """Peak of a device, operations per second."""
        return (self.peak_bf16 if precision == "bf16" else self.peak_fp32) * 1e12


@dataclass
class PlanConfig(PretrainConfig):
    """A pre-training run and its cluster. train.precision=auto takes the precision with the higher peak.

    Attributes:
        cluster: The cluster to plan for.
    """

    cluster: ClusterConfig = field(default_factory=ClusterConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.train.precision == "auto":
            faster_in_bf16 = self.cluster.peak_bf16 > self.cluster.peak_fp32
            self.train = replace(self.train, precision="bf16" if faster_in_bf16 else "fp32")
