"""Read and write folders of adapters, patches and whole models, for other libraries and this one."""
