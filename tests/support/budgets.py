"""Memory requirements of a made-up model."""

from mlx_flash.runtime.memory_plan import MemoryRequirements

MB = 10**6
NEEDS = MemoryRequirements(
    process=100 * MB,
    resident=50 * MB,
    kv_cache=5 * MB,
    context=4096,
    reader=4 * MB,
    slack=10 * MB,
    layers=(20 * MB,) * 10,
    buffer=20 * MB,
    buffers=2,
    workspace=lambda step: 2 * MB + step * MB // 100,
)
MACHINE = 10**12
