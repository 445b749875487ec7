"""Settings of the engine: precision and devices, checkpoints, and what it does about faults."""

from dataclasses import dataclass
from typing import Literal

from lgp_dist.config.data_config import runtime_only

Precision = Literal["fp32", "bf16", "fp16"]
AncestryPrecision = Literal["engine", "fp32", "bf16", "fp16"]
Ops = Literal["auto", "fused", "compiled", "reference"]


@dataclass(frozen=True)
class EngineConfig:
    """Precision, device, memory and communication."""

    precision: Precision = "bf16"
    """bf16 and fp16 compute under autocast; parameters, gradients and optimizer stay in fp32. fp16 scales losses."""
    fp16_scale: float = runtime_only(2.0**16)
    """Initial loss scale of fp16; it halves after an overflow and doubles after 2,000 steps without one."""
    activation_checkpointing: Literal["auto", "on", "off"] = runtime_only("auto")
    """Recompute activations in backward. auto: under ZeRO-3 only, where kept activations hold gathered weights."""
    compile: str = runtime_only("")
    """torch.compile's backend for every block, such as inductor or cudagraphs; empty for none."""
    ops: Ops = runtime_only("auto")
    """How a stitch layer with the norm after it, and a residual add with its norm, are computed. reference: as in timm.
    fused: one operation each, Triton kernels on GPUs. compiled: torch.compile. auto: fused on cards for which
    benchmarks/ shows it to be faster, else reference."""
    offload_optimizer: bool = runtime_only(False)
    """Keep the optimizer's state and its step on the CPU (ZeRO-1 to ZeRO-3)."""
    reduction: Literal["all", "union"] = runtime_only("all")
    """Gradients that ranks exchange: all; or union, once per step those that some rank has (ZeRO-1 and ZeRO-2)."""
    audit: bool = runtime_only(True)
    """Before every optimizer step, compare order of gradients and schedule over ranks, and stop at a difference."""
    audit_weights_every: int = runtime_only(500)
    """Optimizer steps between two comparisons of all weights over ranks; one follows the first step. 0 for none."""
    device: Literal["auto", "cpu", "cuda"] = runtime_only("auto")
    """Device of models and images; auto: the GPU if there is one."""
    threads: int = runtime_only(0)
    """CPU threads per rank. 0: OMP_NUM_THREADS, or else a share of the CPUs that affinity and cgroup allow."""

    def ancestry(self, precision: AncestryPrecision) -> Precision:
        """Precision of the ancestry's forwards."""
        return self.precision if precision == "engine" else precision


@dataclass(frozen=True)
class CheckpointConfig:
    """When a stage saves while it trains, and how many checkpoints are kept."""

    every: int = runtime_only(500)
    """Optimizer steps between two checkpoints; 0 to save only when the run is asked to stop."""
    keep: int = runtime_only(2)
    """Newest checkpoints of a stage that are kept, in addition to the best measured."""
    on_error: Literal["continue", "stop"] = runtime_only("continue")
    """What to do when a checkpoint cannot be written: train on until the next, or stop."""


@dataclass(frozen=True)
class FaultConfig:
    """What the run does about bad steps and hanging ranks."""

    skip_steps: int = runtime_only(0)
    """Consecutive steps that may be skipped for a spike, or a loss or gradient that is not finite; one more stops."""
    spike: float = runtime_only(0.0)
    """A loss above this many times the median of the last 100 good steps is a spike; 0 for no such check."""
    rollback: int = runtime_only(0)
    """How often the run may go back to its last checkpoint instead of stopping for bad steps."""
    timeout_s: float = runtime_only(1800.0)
    """Seconds without progress in a step after which the run ends; ten times as long elsewhere, at most an hour."""
