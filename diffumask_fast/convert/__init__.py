"""Datasets in the formats of other programs: `convert` writes them, `import` reads them."""
