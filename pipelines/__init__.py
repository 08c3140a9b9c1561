"""Model families, one declarative file each. They import the contract (`latentgen.models.family`) and the leaves under it only."""
