"""The contract and the properties, function by function instead of check by check: they share compilations."""

FILES = ("test_contract.py", "test_properties.py")


def pytest_collection_modifyitems(items):
    contract = [i for i, item in enumerate(items) if item.path.name in FILES and "name" in callspec(item)]
    ordered = sorted((items[i] for i in contract), key=lambda item: callspec(item)["name"])
    for i, item in zip(contract, ordered, strict=True):
        items[i] = item


def callspec(item):
    return getattr(getattr(item, "callspec", None), "params", {})
