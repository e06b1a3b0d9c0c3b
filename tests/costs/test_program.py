"""Reading the text of a compiled program: FLOPs and collectives."""

import jax
import jax.numpy as jnp
import pytest

from qkvjax import config as configs
from qkvjax.costs.program import Program
from qkvjax.costs.sharings import train_flops
from qkvjax.models.spec import model_spec
from qkvjax.parallel.mesh import make_mesh
from qkvjax.training.run import compile_for


def test_a_loop_counts_as_often_as_it_runs():
    def f(x, w):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    x, w = jnp.ones((8, 16)), jnp.ones((5, 16, 16))
    text = jax.jit(f).lower(x, w).compile().as_text()
    assert Program(text).matmul_flops() == 5 * 2 * 8 * 16 * 16
    assert Program(text).collectives() == {}


@pytest.mark.parametrize(
    ("sharing", "num_layers"),  # unrolled, and a scan
    [
        ("q-k-v", 2),
        ("q=k=v", 13),
        pytest.param("q-k-v", 13, marks=pytest.mark.slow),
        pytest.param("q=k=v", 2, marks=pytest.mark.slow),
    ],
)
def test_compiled_flops_are_the_models_formula(sharing, num_layers):
    """Within 2 %, where no tile of attention is skipped."""
    config = configs.default()
    config.model.update(sharing=sharing, d_model=128, num_layers=num_layers)
    config.data.update(seq_len=32, batch_size=4)
    spec = model_spec(configs.resolve(config).model, 259, 32)
    mesh = make_mesh({}, jax.devices()[:1])
    compiled, _ = compile_for(configs.resolve(config), spec, mesh)
    flops = Program(compiled.as_text()).matmul_flops()
    assert flops == pytest.approx(4 * 32 * train_flops(spec, 32), rel=0.02)


TPU = """HloModule m

%body (p: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {
  %p = (s32[], f32[8,128]{1,0:T(8,128)}) parameter(0)
  %x = f32[8,128]{1,0:T(8,128)} get-tuple-element(%p), index=1
  %w = bf16[128,64]{1,0:T(8,128)(2,1)} constant(0)
  %c = f32[8,64]{1,0:T(8,128)} convolution(%x, %w), dim_labels=bf_io->bf
  %g = (f32[4,64]{1,0}, f32[8,64]{1,0}) all-gather-start(%x), dimensions={0}
}

%until (p: (s32[], f32[8,128])) -> pred[] {
  %n = s32[]{:T(128)} constant(5), metadata={op_name="n"}
  %p = (s32[], f32[8,128]{1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %n), direction=LT
}

ENTRY %main (a: f32[3,8,128]) -> f32[8,64] {
  %a = f32[3,8,128]{2,1,0} parameter(0)
  %k = f32[3,128,16]{2,1,0} constant(0)
  %batched = f32[3,8,16]{2,1,0} convolution(%a, %k), window={size=3}, dim_labels=0bf_0io->0bf
  %t = (s32[], f32[8,128]) tuple(%a)
  %r = f32[16]{0} all-reduce(%k), to_apply=%sum
  %l = (s32[], f32[8,128]) while(%t), body=%body, backend_config={"known_trip_count":{"n":"6"}}
  ROOT %m = (s32[], f32[8,128]) while(%t), condition=%until, body=%body
}
"""


def test_products_of_a_tpu_are_convolutions():
    program = Program(TPU)
    assert program.matmul_flops() == (6 + 5) * 2 * 8 * 64 * 128 + 2 * 3 * 8 * 16 * 128
    assert program.collectives() == {
        "all-reduce": {"count": 1, "bytes": 64},
        "all-gather": {"count": 11, "bytes": 11 * 8 * 64 * 4},
    }
