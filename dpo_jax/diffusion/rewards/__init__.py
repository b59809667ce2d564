"""What judges images: CLIP's, PickScore's, HPS's and LAION's aesthetic scores, and preferences made of scores."""

from dpo_jax.diffusion.rewards.load import REWARDS as REWARDS
from dpo_jax.diffusion.rewards.load import Reward as Reward
from dpo_jax.diffusion.rewards.load import check_reward as check_reward
from dpo_jax.diffusion.rewards.load import load_reward as load_reward
from dpo_jax.diffusion.rewards.scores import AffineHead as AffineHead
from dpo_jax.diffusion.rewards.scores import aesthetic_score as aesthetic_score
from dpo_jax.diffusion.rewards.scores import clip_score as clip_score
from dpo_jax.diffusion.rewards.scores import clipped_clip_score as clipped_clip_score
from dpo_jax.diffusion.rewards.scores import collapsed_head as collapsed_head
from dpo_jax.diffusion.rewards.scores import hps_score as hps_score
from dpo_jax.diffusion.rewards.scores import pickscore as pickscore
from dpo_jax.diffusion.rewards.scores import pickscore_loss as pickscore_loss
from dpo_jax.diffusion.rewards.scores import pickscore_probabilities as pickscore_probabilities
from dpo_jax.diffusion.rewards.scores import reward_to_preference as reward_to_preference
from dpo_jax.diffusion.rewards.scores import win_rate as win_rate
