"""The options of BackdoorBench, and what becomes of them here: utils/config.py understands them."""

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
}
OWN_ALIASES = {
    "blended": {
        "attack_trigger_img_path": "trigger_path",
        "attack_train_blended_alpha": "train_opacity",
        "attack_test_blended_alpha": "test_opacity",
    },
    "bpp": {"squeeze_num": "levels", "dithering": "dither", "neg_ratio": "negative_ratio"},
    "inputaware": {"mask_density": "density"},
    "refool": {"ghost_rate": "ghost_ratio"},
    "sig": {"sig_delta": "amplitude", "sig_f": "frequency"},
    "wanet": {"s": "strength", "k": "grid_points"},
    "abl": {"isolation_ratio": "isolated", "lr_unlearning_init": "unlearn_lr"},
    "i_bau": {"n_rounds": "rounds", "K": "terms"},
    "nad": {"te_epochs": "teacher_epochs", "p": "power"},
}
# its values by those that they have here
VALUES = {
    "lr_scheduler": {"CosineAnnealingLR": "cosine"},
    "amp": {"True": "auto", "true": "auto", "1": "auto", "False": "fp32", "false": "fp32"},
}
# those that change nothing here, and those that the record of a defense answers
IGNORED = """
attack checkpoint_load checkpoint_save frequency_save git_hash input_channel input_height
input_width interval log non_blocking num_classes num_workers pin_memory prefetch print_every
print_freq random_crop random_rotation steplr_gamma steplr_milestones steplr_stepsize
""".split()
OF_THE_RECORD = """
attack_label_trans attack_target dataset model poison_rate pratio target_label target_type
trigger_type
""".split()
# those that have another meaning here
OTHERWISE = {
    "patch_mask_path": "--trigger_path is the patch, transparent where BackdoorBench has black",
    "attack_train_replace_imgs_path": "the poisoned images are made here, without files",
    "attack_test_replace_imgs_path": "the poisoned images are made here, without files",
    "index": "--data_seed chooses the clean images",
    "save_path": "--record_path and --save_folder_name say where the run is kept",
    "clean_sample_num": "--clean_count is the number of clean images",
    "poison_ratio": "--pratio is the poisoned share",
    "target_class": "--attack_target is the target",
    "seed": "--random_seed is the seed",
}
