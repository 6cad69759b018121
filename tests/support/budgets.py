"""Memory requirements of made-up models, and plans for them."""

from mlx_flash.runtime.memory_plan import Plan, plan_for
from mlx_flash.runtime.memory_requirements import MemoryRequirements
from mlx_flash.runtime.options import PagingOptions

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


def plan(ram: int | None, needs=NEEDS, machine=MACHINE, **options) -> Plan:
    """The plan for a budget."""
    return plan_for(needs, PagingOptions(ram=ram, **options), machine)
