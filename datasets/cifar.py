"""CIFAR-10 and CIFAR-100: 50,000 + 10,000 photographs, 32 x 32."""
import torch

from datasets.npz import load_or_download

CIFAR10 = [  # by label
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
]
CIFAR100 = [  # by label
    "apple", "aquarium_fish", "baby", "bear", "beaver", "bed", "bee", "beetle", "bicycle", "bottle", "bowl", "boy",
    "bridge", "bus", "butterfly", "camel", "can", "castle", "caterpillar", "cattle", "chair", "chimpanzee", "clock",
    "cloud", "cockroach", "couch", "crab", "crocodile", "cup", "dinosaur", "dolphin", "elephant", "flatfish",
    "forest", "fox", "girl", "hamster", "house", "kangaroo", "keyboard", "lamp", "lawn_mower", "leopard", "lion",
    "lizard", "lobster", "man", "maple_tree", "motorcycle", "mountain", "mouse", "mushroom", "oak_tree", "orange",
    "orchid", "otter", "palm_tree", "pear", "pickup_truck", "pine_tree", "plain", "plate", "poppy", "porcupine",
    "possum", "rabbit", "raccoon", "ray", "road", "rocket", "rose", "sea", "seal", "shark", "shrew", "skunk",
    "skyscraper", "snail", "snake", "spider", "squirrel", "streetcar", "sunflower", "sweet_pepper", "table", "tank",
    "telephone", "television", "tiger", "tractor", "train", "trout", "tulip", "turtle", "wardrobe", "whale",
    "willow_tree", "wolf", "woman", "worm",
]
NOISY = 100  # CIFAR-100's label + NOISY: the same class, whose training labels are to be randomised


def load_cifar10(data_dir):
    """(train_images, train_labels), (test_images, test_labels), as `load_npz` gives them; label = class 0 .. 9.

    Raises:
        DataError: see `load_or_download`.
    """
    return load_or_download("cifar10", "CIFAR10", "cifar-10-batches-py", data_dir, (32, 32, 3), 10)


def load_cifar100(data_dir, labels):
    """As `load_cifar10`, with the fine labels 0 .. 99; each label + 100 among `labels` adds its class once more.

    The rows of label + 100 are those of the class and still have its labels: `make_tasks` randomises them.
    """
    splits = load_or_download("cifar100", "CIFAR100", "cifar-100-python", data_dir, (32, 32, 3), 100)
    again = torch.tensor([label - NOISY for label in labels if label >= NOISY])
    if len(again) == 0:
        return splits

    def add(images, targets):
        rows = torch.isin(targets, again)
        return torch.cat([images, images[rows]]), torch.cat([targets, targets[rows] + NOISY])

    return tuple(add(*split) for split in splits)
