"""What hpo.py searches, and how."""
from dataclasses import dataclass, fields, replace

from utils.cluster import check_shares
from utils.config import default_name, make_parser, make_settings
from utils.config_files import ConfigError, check, load_yaml, read_space

OBJECTIVES = ("multihead", "zoo")
ZOO_ROUNDS = 5  # of the short continual zoo that a search may train


@dataclass(frozen=True)
class Search:
    """How hpo.py searches; what a trial trains is a `Settings`."""

    space: dict[str, tuple]  # of each key searched: how (choice, log, uniform) and the values or the two ends
    objective: str  # multihead, zoo
    num_samples: int  # trials
    max_concurrent: int | None  # trials at once at most (None: as many as fit)
    hp_file: dict  # what the hyper-parameter file held
    cpus_per_trial: float
    gpus_per_trial: float | None  # None: a whole one where there are any
    address: str | None  # of a running Ray cluster (None: this machine)


def read_search(prog, argv=None):
    """Read the command line and both files of a search.

    Returns:
        settings: `Settings` of a trial, as they are before the search changes them.
        search: `Search`.

    Raises:
        ConfigError: anything missing, unknown, out of range or contradictory.
    """
    p = make_parser(prog, "Search training settings on rows held out of the training set, on this machine or on a Ray "
                    "cluster.")
    p.add_argument("--objective", default="multihead",
                   help=f"train multihead (the default), or zoo: a continual zoo of {ZOO_ROUNDS} rounds at most")
    p.add_argument("--num_samples", type=int, default=81, help="trials (default: 81)")
    p.add_argument("--max_concurrent", type=int, help="trials at once at most (default: as many as fit)")
    p.add_argument("--cpus_per_trial", type=float, default=1, help="CPU cores of a trial (default: 1)")
    p.add_argument("--gpus_per_trial", type=float,
                   help="GPUs of a trial, 0.25: four share one (default: 1 where there are GPUs, else 0)")
    p.add_argument("--address", help="a running Ray cluster, HOST:PORT or auto (default: this machine alone)")
    flags = vars(p.parse_args(argv))
    objective = check("--objective", flags["objective"], str, choices=OBJECTIVES)
    for flag in ("num_samples", "max_concurrent"):
        if flags[flag] is not None:
            check(f"--{flag}", flags[flag], int, 1, 10**6)
    check_shares("trial", flags["cpus_per_trial"], flags["gpus_per_trial"], flags["device"])
    if flags["name"] is None:
        flags["name"] = default_name("hpo" if objective == "multihead" else "hpo-zoo", flags)
    if objective == "zoo":
        zoo = {"continual": True, "warm_start": False, "num_rounds": None, "tasks_per_round": None, "replay_frac": None,
               "extend": None}
        settings = make_settings("modelzoo", flags | zoo)
        settings = replace(settings, num_rounds=min(ZOO_ROUNDS, settings.num_rounds))
    else:
        settings = make_settings("multihead", flags)
    if settings.weights:
        raise ConfigError(f"{settings.hp_config}: weights: a search trains from a fresh start; leave them out")
    hp_file = load_yaml(settings.hp_config)
    space = read_space(settings.hp_config, hp_file)
    if (lowest := min(space["lr"][1])) < settings.lr_min:
        raise ConfigError(f"{settings.hp_config}: lr_min: {settings.lr_min:g} must be at most {lowest:g}, the lowest "
                          "lr that is searched; lower it, or give search: lr")
    read = {"space": space, "hp_file": hp_file}
    return settings, Search(**read, **{f.name: flags[f.name] for f in fields(Search) if f.name not in read})
