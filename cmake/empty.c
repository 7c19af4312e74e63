typedef int elastic_empty;  // what a library is made of that is not wanted
