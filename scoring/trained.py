"""The trained network of a checkpoint, for the programs that score it or use it."""

from types import SimpleNamespace

from config import BadInput
from methods.find import method_and_model
from rounds.reading import check_fits, checkpoint_of
from scoring.evaluate import with_weights
from scoring.norm_statistics import statistics_like


def model_of(checkpoint, file, device):
    """Return the checkpoint's network; raises BadInput if what it holds does not fit its config."""
    try:
        config = SimpleNamespace(**checkpoint["config"])
        model = method_and_model(config)[1]
        model.load_state_dict(checkpoint["weights"])
    except (AttributeError, KeyError, RuntimeError, TypeError) as problem:
        reason = str(problem).splitlines()[0]
        raise BadInput(f"{file}: has weights that do not fit its config ({reason}), train it again") from None
    for weights in checkpoint["local"].values():
        check_fits(file, "local weights", weights, {name: value for name, value in model.state_dict().items()
                                                    if name in weights})
    for of_site in checkpoint["statistics"].values():
        check_fits(file, "statistics", of_site, statistics_like(model))
    return model.to(device)


def load_run(file, sites, config, device):
    """Return a checkpoint's round, its network, and its sites' statistics and local weights. config: that of
    the run; raises BadInput for a checkpoint of another."""
    checkpoint = checkpoint_of(config, file)
    model = model_of(checkpoint, file, device)
    return checkpoint["round"], model, *with_weights(model, checkpoint, sites, config, device)
