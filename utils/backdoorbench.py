"""The options of BackdoorBench, and what becomes of them here: utils/parsing.py understands them.

A name is looked up for the script first, then for all scripts. What is not here is unknown.
"""

import re
from pathlib import Path

# BackdoorBench's options by the names that they have here, of all scripts and of single ones
ALIASES = {
    "attack_label_trans": "label_mode",
    "wd": "weight_decay",
    "ratio": "clean_ratio",
    "sgd_momentum": "momentum",
    "client_optimizer": "optimizer",
    "lr_scheduler": "schedule",
    "amp": "precision",
    "bd_yaml_path": "yaml_path",
    "data_root": "dataset_path",
    "acc_ratio": "tolerance",
}
OWN_ALIASES = {
    "convert": {"pratio": "poisoned_share"},  # of what was poisoned elsewhere
    "blended": {
        "attack_trigger_img_path": "trigger_path",
        "attack_train_blended_alpha": "train_opacity",
        "attack_test_blended_alpha": "test_opacity",
    },
    "blind": {
        "backdoor_batch_loss_threshold": "start_loss",
        "batch_history_len": "start_batches",
        "weight_loss_balance_mode": "balance",
        "fix_scale_backdoor_weight": "backdoor_weight",
    },
    "bpp": {"squeeze_num": "levels", "dithering": "dither", "neg_ratio": "negative_ratio"},
    "inputaware": {"mask_density": "density", "clean_train_epochs": "mask_epochs", "lr_C": "lr"},
    "lf": {"lowFrequencyPatternPath": "trigger_path"},
    "lira": {
        "eps": "epsilon",
        "both_train_epochs": "generator_epochs",
        "lr_atk": "generator_lr",
        "finetune_lr": "lr",
        "finetune_client_optimizer": "optimizer",
        "finetune_lr_scheduler": "schedule",
        "finetune_sgd_momentum": "momentum",
        "finetune_wd": "weight_decay",
    },
    "refool": {
        "ghost_rate": "ghost_ratio",
        "alpha_t": "alpha",
        "r_adv_img_folder_path": "reflection_folder",
    },
    "sig": {"sig_delta": "amplitude", "sig_f": "frequency"},
    "trojannn": {"mask_update_iters": "steps"},
    "wanet": {"s": "strength", "k": "grid_points"},
    "abl": {
        "isolation_ratio": "isolated",
        "lr_unlearning_init": "unlearn_lr",
        "tuning_epochs": "isolate_epochs",
        "unlearning_epochs": "unlearn_epochs",
        "finetuning_epochs": "epochs",
        "lr_finetuning_init": "lr",
        "gradient_ascent_type": "floor",
    },
    "ac": {"nb_dims": "components", "cluster_analysis": "criterion"},
    "anp": {
        "anp_eps": "epsilon",
        "anp_steps": "ascents",
        "anp_alpha": "alpha",
        "nb_iter": "steps",
        "lr": "mask_lr",
        "pruning_number": "threshold",
    },
    "d_br": {"poison_ratio": "alpha_p"},
    "d_st": {"poison_ratio": "alpha_p"},
    "dbd": {
        "batch_size_self": "ssl_batch_size",
        "epoch_self": "ssl_epochs",
        "epoch_warmup": "head_epochs",
        "epsilon": "labelled",
    },
    "ft_sam": {"rho_max": "rho"},
    "i_bau": {"n_rounds": "rounds", "K": "terms", "lr": "unlearn_lr"},
    "mcr": {
        "ft_client_optimizer": "optimizer",
        "ft_epochs": "epochs",
        "ft_lr": "lr",
        "ft_lr_scheduler": "schedule",
        "ft_sgd_momentum": "momentum",
        "ft_wd": "weight_decay",
        "train_curve_epochs": "curve_epochs",
    },
    "nab": {"epoch_lga": "isolate_epochs"},
    "nad": {"te_epochs": "teacher_epochs", "p": "power"},
    "nc": {
        "init_cost": "penalty",
        "mask_lr": "search_lr",
        "nc_epoch": "search_epochs",
        "unlearning_ratio": "share",
    },
    "npd": {
        "lr": "polarizer_lr",
        "adv_lr": "step_size",
        "inner_steps": "steps",
        "lmd1": "lambda1",
        "lmd2": "lambda2",
        "lmd3": "lambda3",
        "lmd4": "lambda4",
        "target_layer_name": "layer",
        "trigger_norm": "radius",
        "warm_epochs": "warmup_epochs",
    },
    "rnp": {
        "clean_threshold": "forgotten",
        "unlearning_lr": "lr",
        "unlearning_epochs": "epochs",
        "recovering_lr": "mask_lr",
        "recovering_epochs": "mask_epochs",
        "pruning_number": "threshold",
    },
    "sau": {
        "lr": "unlearn_lr",
        "n_rounds": "epochs",
        "adv_lr": "step_size",
        "adv_steps": "steps",
        "beta_1": "beta1",
        "beta_2": "beta2",
        "lmd_1": "lambda1",
        "lmd_2": "lambda2",
        "lmd_3": "lambda3",
        "trigger_norm": "radius",
    },
}
# its values by those that they have here
VALUES = {
    "lr_scheduler": {"CosineAnnealingLR": "cosine"},
    "ft_lr_scheduler": {"CosineAnnealingLR": "cosine"},
    "finetune_lr_scheduler": {"CosineAnnealingLR": "cosine"},
    "amp": {"True": "auto", "true": "auto", "1": "auto", "False": "fp32", "false": "fp32"},
    "weight_loss_balance_mode": {"MGDA": "mgda"},
    "gradient_ascent_type": {"LGA": "lga", "Flooding": "flooding"},
    "cluster_analysis": {"relative-size": "size", "silhouette-scores": "silhouette"},
}
# those that change nothing here, of all scripts and of single ones; and those that the record of a
# defense answers
IGNORED = """
attack checkpoint_load checkpoint_save frequency_save git_hash input_channel input_height
input_width interval log non_blocking num_classes num_workers pin_memory prefetch print_every
print_freq random_crop random_rotation steplr_gamma steplr_milestones steplr_stepsize
""".split()
UNTRAINED = """
batch_size client_optimizer epochs lr lr_scheduler sgd_momentum u_max u_min u_num wd
""".split()  # of defenses that only prune: their scripts take them and do not use them
OWN_IGNORED = {
    "bpp": ["grid_rescale"],
    "inputaware": """
        EPSILON schedulerC_lambda schedulerC_milestones schedulerG_lambda schedulerG_milestones
        schedulerM_lambda schedulerM_milestones
        """.split(),
    "lira": """
        epochs_per_external_eval finetune_steplr_gamma finetune_steplr_milestones save_model
        test_n_size use_data_parallel verbose
        """.split(),
    "ac": ["cluster_batch_size"],
    "anp": "client_optimizer epochs lr_scheduler sgd_momentum wd".split(),
    "bnp": UNTRAINED,
    "clp": UNTRAINED,
    "ep": [name for name in UNTRAINED if name != "batch_size"],
    "d_br": ["save_all_process", "num_workers_semi"],
    "d_st": ["save_all_process", "num_workers_semi"],
    "dbd": ["num_workers_semi"],
    "ft_sam": ["checkpoint_path"],
    "i_bau": ["epochs", "lr_scheduler", "sgd_momentum"],
    "mcr": ["test_curve_every"],
    "nab": ["num_workers_semi", "batch_size_lgd"],
    "nc": ["EPSILON", "n_times_test", "to_file"],
    "npd": ["client_optimizer", "lr_scheduler"],
    "rnp": "client_optimizer lr_scheduler sgd_momentum wd".split(),
    "sau": "client_optimizer lr_scheduler sgd_momentum".split(),
}
OF_THE_RECORD = """
attack_label_trans attack_target dataset model poison_rate pratio target_class target_label
target_type trigger_type
""".split()
# those that have one value here, or a default that is called otherwise: at it they change nothing
FIXED = {
    "blind": {"fix_scale_normal_weight": "1"},
    "ctrl": {
        "pos_list": "15,31",
        "trigger_channels": "1,2",
        "use_clean_label": "true",
        "use_dct": "false",
        "use_yuv": "true",
    },
    "ftrojan": {
        "YUV": "true",
        "channel_list": "1,2",
        "pos_list": "15,15,31,31",
        "window_size": "32",
    },
    "inputaware": {
        "C_lr_scheduler": "none",
        "lambda_div": "1",
        "lambda_norm": "100",
        "lr_G": "0.01",
        "lr_M": "0.01",
    },
    "lc": {"reduced_amplitude": "1"},
    "lira": {
        "attack_model": "autoencoder",
        "finetune_alpha": "0.5",
        "finetune_eps": "0.01",
        "fix_generator_epoch": "1",
        "test_alpha": "0.5",
        "test_eps": "0.01",
    },
    "refool": {"ghost_alpha": "-1", "offset": "0,0", "sigma": "-1"},
    "wanet": {"grid_rescale": "1"},
    "abl": {"finetuning_ascent_model": "true", "flooding": "0.5"},
    "ac": {"nb_clusters": "2"},
    "anp": {"pruning_by": "threshold", "pruning_max": "0.9", "pruning_step": "0.05"},
    "d_br": {"trans1": "rotate", "trans2": "affine"},
    "d_st": {"trans1": "rotate", "trans2": "affine"},
    "fp": {"once_prune_ratio": "0.01"},
    "ft_sam": {"alpha": "0", "adaptive": "true", "rho_min": "2"},
    "i_bau": {"adam_betas": "0.9,0.999", "client_optimizer": "adam", "optim": "adam", "wd": "0"},
    "mcr": {"curve": "bezier", "num_bends": "3", "use_clean_subset": "true"},
    "nc": {
        "atk_succ_threshold": "98",
        "cleaning_ratio": "0.05",
        "cost_multiplier": "2",
        "early_stop": "true",
        "early_stop_patience": "25",
        "early_stop_threshold": "0.99",
        "patience": "5",
        "use_norm": "1",
    },
    "npd": {"max_init": "false", "model_name": "convbn", "norm_type": "l2", "use_residual": "no"},
    "rnp": {"pruning_by": "threshold", "pruning_max": "0.9", "pruning_step": "0.05"},
    "sau": {
        "adam_betas": "0.9,0.999",
        "norm_type": "l_inf",
        "optim": "adam",
        "outer_steps": "1",
        "pgd_init": "max",
        "train_mode": "false",
    },
    "spectral": {"percentile": "85"},
}
# those that have another meaning here
OTHERWISE = {
    "patch_mask_path": "--trigger_path is the patch, transparent where BackdoorBench has black",
    "attack_train_replace_imgs_path": "the poisoned images are made here, without files; python "
    "convert.py from-images trains on a poisoned set made elsewhere",
    "attack_test_replace_imgs_path": "the poisoned images are made here, without files; python "
    "convert.py from-images trains on a poisoned set made elsewhere",
    "index": "--data_seed chooses the clean images",
    "save_path": "--record_path and --save_folder_name say where the run is kept",
    "clean_sample_num": "--clean_count is the number of clean images",
    "poison_ratio": "--pratio is the poisoned share",
    "target_class": "--attack_target is the target",
    "seed": "--random_seed is the seed",
    "load_path": "python convert.py from-backdoorbench makes a record of its folder",
    "cos_t_max": "the cosine falls until the end of the training",
    "adam_betas": "Adam has the betas 0.9 and 0.999",
    "epochs": "nothing is trained for so many epochs",
    "batch_size": "the whole set counts, in batches whose size changes nothing",
    "lr": "single steps have rates of their own: see --help",
    "wd": "the weights have no penalty",
    "sgd_momentum": "no option sets the momentum",
    "client_optimizer": "the optimizer is fixed",
    "lr_scheduler": "the schedule is fixed",
    "pretrain_model_path": "--clean_record names the record of a clean model",
}
OWN_OTHERWISE = {
    "lc": {"reduced_amplitude": "--amplitude is in grey levels, 255 where BackdoorBench has 1"},
    "blind": {"mgda_normalize": "--balance mgda divides each gradient by its loss"},
    "lira": {
        **dict.fromkeys(("finetune_alpha", "test_alpha"), "--alpha holds for all phases"),
        **dict.fromkeys(("finetune_eps", "test_eps"), "--epsilon holds for all phases"),
        "finetune_epochs": "--epochs counts all epochs after those of the generator",
    },
    "trojannn": dict.fromkeys(
        ("neuron_target_values", "num_neuron", "selected_layer_name", "selected_layer_param_name"),
        "the neurons are chosen by how strongly they are connected to the last layer",
    ),
    "abl": {"flooding": "--gamma is the loss at which --floor flooding holds"},
    "dbd": dict.fromkeys(("config_pretrain", "config_semi"), "--help lists what these files say"),
    "ft_sam": {"rho_min": "--rho is the same in all steps"},
    "mcr": {
        "load_other_model_path": "the other end of the curve is the victim after fine-tuning",
        "test_t": "--position with --selection fixed is the point on the curve",
    },
    "nab": dict.fromkeys(
        ("batch_size_self", "epoch_self", "epoch_warmup", "epsilon", "temperature"),
        "the pseudo-labels are those of a network that is trained on the --trusted images",
    ),
    "nad": {"teacher_model_loc": "the teacher is the victim after --teacher_epochs"},
    "nc": {
        "atk_succ_threshold": "--goal is a fraction, 0.98 for 98",
        "cleaning_ratio": "--clean_ratio is the share of the clean images",
    },
    "npd": {"target_lab": "--targets chooses the classes"},
    "rnp": {
        "mask_file": "the mask is learned in the same run",
        "schedule": "the rate of --lr falls to a tenth after half of the epochs",
    },
    "spectral": {
        "percentile": "--epsilon is the poisoned share that is expected of a label, and 1.5 times "
        "as much is removed: 0.1 for the percentile 85"
    },
}
# keys of its YAML files that hold a list
LISTS = frozenset(
    """
    adam_betas channel_list finetune_steplr_milestones index offset pos_list schedule
    schedulerC_milestones schedulerG_milestones schedulerM_milestones steplr_milestones test_t
    trigger_channels
    """.split()
)
# scripts that are called otherwise here
SCRIPTS = {
    "d-br": "d_br",
    "d-st": "d_st",
    "ft-sam": "ft_sam",
    "i-bau": "i_bau",
    "ftrojann": "ftrojan",
    "ftrojannn": "ftrojan",
}


def names(own):
    """All names of BackdoorBench that a script called `own` understands or explains."""
    tables = (OWN_ALIASES, OWN_IGNORED, FIXED, OWN_OTHERWISE)
    return {
        *ALIASES,
        *IGNORED,
        *OTHERWISE,
        *(name for table in tables for name in table.get(own, ())),
    }


def is_fixed(own, name, text):
    """Whether `text` is the one value that an option of FIXED has here."""
    return _plain(FIXED[own][name]) == _plain(text or "")


def _plain(text):
    """Numbers as numbers, all else in lower case: 1.0 is 1, and True is true."""
    words = re.split(r"[\s,]+", text.strip().strip("[]").lower())
    return [float(word) if re.fullmatch(r"-?\d+\.?\d*", word) else word for word in words]


def explain(own, name):
    """What an option that has another meaning here is called; None where nothing is known."""
    if name in OWN_OTHERWISE.get(own, ()):
        return OWN_OTHERWISE[own][name]
    if name in FIXED.get(own, ()):
        return f"it is always {FIXED[own][name]}"
    return OTHERWISE.get(name)


def place_of(path):
    """What stands in for a YAML file of BackdoorBench's config/ that is not here; None for any
    other path."""
    found = re.search(r"config/(attack|defense)/([^/]+)/[^/]+\.ya?ml$", Path(path).as_posix())
    if not found:
        return None
    kind, name = found.groups()
    if name == "prototype":
        return (
            "what BackdoorBench's prototype files say is the default here: leave --yaml_path out, "
            "or give the path at which the file lies"
        )
    return (
        f"here the file is config/{kind}/{SCRIPTS.get(name, name)}.yaml, or give the path at which "
        "BackdoorBench's file lies"
    )
