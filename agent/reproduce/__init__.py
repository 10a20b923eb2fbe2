"""The papers' experiments on the live runtime: `offcut reproduce loadpart`, `offcut reproduce d3`."""
