"""The formulas of the methods: functions of tensors and numbers, in place if the name ends in ``_``."""

from lit_sparse.functional.budget import within_budget as within_budget
from lit_sparse.functional.density import density as density
from lit_sparse.functional.density import product_density as product_density
from lit_sparse.functional.density import product_sparsity_bound as product_sparsity_bound
from lit_sparse.functional.gora import allotted_ranks as allotted_ranks
from lit_sparse.functional.gora import compressed_gradient as compressed_gradient
from lit_sparse.functional.lora_ga import gradient_factors as gradient_factors
from lit_sparse.functional.masks import kept_entries as kept_entries
from lit_sparse.functional.masks import top_fraction_mask as top_fraction_mask
from lit_sparse.functional.preferences import answer_log_probabilities as answer_log_probabilities
from lit_sparse.functional.preferences import dpo_loss as dpo_loss
from lit_sparse.functional.preferences import ipo_loss as ipo_loss
from lit_sparse.functional.preferences import orpo_loss as orpo_loss
from lit_sparse.functional.preferences import simpo_loss as simpo_loss
from lit_sparse.functional.proximal import optimizer_metric_threshold as optimizer_metric_threshold
from lit_sparse.functional.proximal import released_threshold as released_threshold
from lit_sparse.functional.proximal import released_threshold_ as released_threshold_
from lit_sparse.functional.proximal import soft_threshold as soft_threshold
from lit_sparse.functional.proximal import soft_threshold_ as soft_threshold_
from lit_sparse.functional.schedules import cubic_density as cubic_density
from lit_sparse.functional.schedules import resolve_step as resolve_step
from lit_sparse.functional.schedules import threshold_stages as threshold_stages
from lit_sparse.functional.sensitivity import moving_average as moving_average
from lit_sparse.functional.sensitivity import sensitivities as sensitivities
from lit_sparse.functional.sensitivity import sensitivity as sensitivity
from lit_sparse.functional.sensitivity import update_moving_average_ as update_moving_average_
