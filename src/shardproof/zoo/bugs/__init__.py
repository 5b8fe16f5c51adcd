"""The bugs, one file per family; `zoo.table` lists the files."""
