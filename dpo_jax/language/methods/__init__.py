"""Preference-optimisation methods for language, one paper per module; importing a loss loads only jax and chex.

The losses can be had from here; all other functions of a paper (weights, selections, metrics) from its module.
"""

from dpo_jax.language.methods.adpo import (
    adpo_adaptive_loss,
    adpo_loss,
    adpo_pair_loss,
    adpo_plackett_luce_loss,
    adpo_rewards_loss,
)
from dpo_jax.language.methods.adversarial_po import (
    adversarial_difference_loss,
    adversarial_reward_loss,
    adversarial_term_mean_loss,
    rrhf_loss,
)
from dpo_jax.language.methods.asft import asft_loss, asft_tempered_loss
from dpo_jax.language.methods.bco import bco_loss, bco_udm_loss
from dpo_jax.language.methods.beta_dpo import beta_dpo_loss
from dpo_jax.language.methods.cdpo_critical import cdpo_critical_loss
from dpo_jax.language.methods.cpo import arpo_loss, cpo_hinge_loss, cpo_ipo_loss, cpo_loss
from dpo_jax.language.methods.dpa_logic import (
    ccpo_loss,
    ceunl_loss,
    cfunl_loss,
    cunl_loss,
    funl_loss,
    logic_loss,
    qfunl_loss,
    uncpo_loss,
)
from dpo_jax.language.methods.dpo import (
    alpha_divergence_loss,
    cdpo_loss,
    dpo_loss,
    forward_kl_loss,
    hinge_loss,
    ipo_loss,
    ipo_sum_loss,
    js_loss,
    rdpo_loss,
    reference_free_loss,
    robust_loss,
    rpo_loss,
    rpo_sum_loss,
    rpo_token_mean_loss,
)
from dpo_jax.language.methods.dpo_variants import (
    aot_loss,
    aot_unpaired_loss,
    apo_down_loss,
    apo_zero_loss,
    bco_pair_loss,
    discopop_loss,
    exo_pair_loss,
    mpo_loss,
    nca_pair_loss,
)
from dpo_jax.language.methods.gpo import gpo_exponential_loss, gpo_savage_loss, gpo_squared_hinge_loss, gpo_squared_loss
from dpo_jax.language.methods.ipr_bcr import bcr_dpo_loss, bcr_simpo_loss
from dpo_jax.language.methods.kto import apo_zero_unpaired_loss, kto_loss, kto_pair_loss
from dpo_jax.language.methods.ld_dpo import ld_dpo_loss
from dpo_jax.language.methods.listwise import (
    lambda_loss,
    list_softmax_loss,
    pair_hinge_loss,
    pair_logistic_loss,
    plackett_luce_loss,
    point_mse_loss,
    point_sigmoid_loss,
)
from dpo_jax.language.methods.listwise_nca import exo_reward_loss, infonca_loss, nca_loss
from dpo_jax.language.methods.ln_dpo import ln_dpo_loss
from dpo_jax.language.methods.madpo import madpo_loss
from dpo_jax.language.methods.orpo import orpo_loss, orpo_token_mean_loss
from dpo_jax.language.methods.ranking_accuracy import gamma_dpo_loss
from dpo_jax.language.methods.reward_model import (
    bradley_terry_loss,
    bradley_terry_margin_loss,
    bradley_terry_soft_loss,
    davidson_loss,
    rao_kupper_loss,
    reward_pairs_loss,
    reward_plackett_luce_loss,
    reward_prompt_pairs_loss,
)
from dpo_jax.language.methods.robust_shift import robust_shift_loss
from dpo_jax.language.methods.sem_dpo import sem_dpo_loss
from dpo_jax.language.methods.sft import sft_loss
from dpo_jax.language.methods.simpo import alphapo_loss, simper_loss, simpo_hinge_loss, simpo_loss
from dpo_jax.language.methods.sppo import sppo_hard_loss, sppo_loss, sppo_single_loss
from dpo_jax.language.methods.srpo import srpo_loss
from dpo_jax.language.methods.step_dpo import step_dpo_loss
from dpo_jax.language.methods.survey import (
    cal_dpo_loss,
    chi_po_loss,
    dpop_loss,
    dr_dpo_loss,
    npo_loss,
    odpo_identity_loss,
    odpo_loss,
    rrhf_pair_loss,
    slic_loss,
)
from dpo_jax.language.methods.tgdpo import tgdpo_loss
from dpo_jax.language.methods.three_d_properties import flex_dpo_loss
from dpo_jax.language.methods.token_dpo import tdpo1_loss, tdpo2_loss
from dpo_jax.language.methods.tree_po import tree_po_loss, tree_po_plain_loss
from dpo_jax.language.methods.triple_po import (
    triple_po_hinge_loss,
    triple_po_ipo_loss,
    triple_po_length_loss,
    triple_po_loss,
)
from dpo_jax.language.methods.wpo_weights import wpo_loss

__all__ = [
    "adpo_adaptive_loss",
    "adpo_loss",
    "adpo_pair_loss",
    "adpo_plackett_luce_loss",
    "adpo_rewards_loss",
    "adversarial_difference_loss",
    "adversarial_reward_loss",
    "adversarial_term_mean_loss",
    "alpha_divergence_loss",
    "alphapo_loss",
    "aot_loss",
    "aot_unpaired_loss",
    "apo_down_loss",
    "apo_zero_loss",
    "apo_zero_unpaired_loss",
    "arpo_loss",
    "asft_loss",
    "asft_tempered_loss",
    "bco_loss",
    "bco_pair_loss",
    "bco_udm_loss",
    "bcr_dpo_loss",
    "bcr_simpo_loss",
    "beta_dpo_loss",
    "bradley_terry_loss",
    "bradley_terry_margin_loss",
    "bradley_terry_soft_loss",
    "cal_dpo_loss",
    "ccpo_loss",
    "cdpo_critical_loss",
    "cdpo_loss",
    "ceunl_loss",
    "cfunl_loss",
    "chi_po_loss",
    "cpo_hinge_loss",
    "cpo_ipo_loss",
    "cpo_loss",
    "cunl_loss",
    "davidson_loss",
    "discopop_loss",
    "dpo_loss",
    "dpop_loss",
    "dr_dpo_loss",
    "exo_pair_loss",
    "exo_reward_loss",
    "flex_dpo_loss",
    "forward_kl_loss",
    "funl_loss",
    "gamma_dpo_loss",
    "gpo_exponential_loss",
    "gpo_savage_loss",
    "gpo_squared_hinge_loss",
    "gpo_squared_loss",
    "hinge_loss",
    "infonca_loss",
    "ipo_loss",
    "ipo_sum_loss",
    "js_loss",
    "kto_loss",
    "kto_pair_loss",
    "lambda_loss",
    "ld_dpo_loss",
    "list_softmax_loss",
    "ln_dpo_loss",
    "logic_loss",
    "madpo_loss",
    "mpo_loss",
    "nca_loss",
    "nca_pair_loss",
    "npo_loss",
    "odpo_identity_loss",
    "odpo_loss",
    "orpo_loss",
    "orpo_token_mean_loss",
    "pair_hinge_loss",
    "pair_logistic_loss",
    "plackett_luce_loss",
    "point_mse_loss",
    "point_sigmoid_loss",
    "qfunl_loss",
    "rao_kupper_loss",
    "rdpo_loss",
    "reference_free_loss",
    "reward_pairs_loss",
    "reward_plackett_luce_loss",
    "reward_prompt_pairs_loss",
    "robust_loss",
    "robust_shift_loss",
    "rpo_loss",
    "rpo_sum_loss",
    "rpo_token_mean_loss",
    "rrhf_loss",
    "rrhf_pair_loss",
    "sem_dpo_loss",
    "sft_loss",
    "simper_loss",
    "simpo_hinge_loss",
    "simpo_loss",
    "slic_loss",
    "sppo_hard_loss",
    "sppo_loss",
    "sppo_single_loss",
    "srpo_loss",
    "step_dpo_loss",
    "tdpo1_loss",
    "tdpo2_loss",
    "tgdpo_loss",
    "tree_po_loss",
    "tree_po_plain_loss",
    "triple_po_hinge_loss",
    "triple_po_ipo_loss",
    "triple_po_length_loss",
    "triple_po_loss",
    "uncpo_loss",
    "wpo_loss",
]
