# cmake -DNM=nm -P check_weak_symbols.cmake -- OBJECT...
# Fails if an object defines a weak or unique symbol: the linker keeps one copy of those for all instruction sets.
set(found "")
set(is_object FALSE)
math(EXPR last "${CMAKE_ARGC} - 1")
foreach(i RANGE ${last})
  if(is_object)
    execute_process(COMMAND ${NM} --defined-only -C ${CMAKE_ARGV${i}} OUTPUT_VARIABLE symbols
                    COMMAND_ERROR_IS_FATAL ANY)
    string(REGEX MATCHALL "[0-9a-fA-F]+ [WVu] [^\n]*" weak "${symbols}")
    foreach(symbol IN LISTS weak)
      string(APPEND found "\n  ${CMAKE_ARGV${i}}: ${symbol}")
    endforeach()
  elseif(CMAKE_ARGV${i} STREQUAL "--")
    set(is_object TRUE)
  endif()
endforeach()
if(found)
  message(FATAL_ERROR "Kernel objects share symbols between instruction sets (give the functions internal linkage, "
                      "or keep the standard library out of kernels):${found}")
endif()
