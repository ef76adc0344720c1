# What nvcc is asked to make, by what it knows. CMakeLists.txt includes this; tests run it with an nvcc of their own:
# cmake -DNVCC=nvcc "-DARCHITECTURES=80-real;90-real" -P cuda_code.cmake

# Kernels take up to 32 KB of arguments; older compilers refuse more than 4.
set(LOPT_OLDEST_CUDA 12.1)
# PTX for GPUs that are newer than all of them.
set(LOPT_CUDA_ARCHITECTURES 80-real 90-real 100-real 80-virtual)

# Sets `result` to the reason why this nvcc cannot be used; empty if it can.
function(lopt_nvcc_refusal nvcc result)
  execute_process(COMMAND ${nvcc} --version OUTPUT_VARIABLE answer ERROR_QUIET)
  set(refusal "")
  if(NOT answer MATCHES "release ([0-9]+\\.[0-9]+)")
    set(refusal "${nvcc} --version does not answer as nvcc does")
  elseif(CMAKE_MATCH_1 VERSION_LESS LOPT_OLDEST_CUDA)
    set(refusal "${nvcc} is of CUDA ${CMAKE_MATCH_1}, the kernels need ${LOPT_OLDEST_CUDA} or later")
  endif()
  set(${result} "${refusal}" PARENT_SCOPE)
endfunction()

# Sets `result` to what --generate-code is told: sm_90 and the like, compute_80. Without `architectures` those above,
# as far as this nvcc knows them; of those that were asked for it must know all.
#
# Machine code of all architectures is made from the intermediate code (PTX) of the oldest: nothing newer is used, and
# the compiler's front end runs once. CMake would run it for each (kernels/small_fc_lopt/GPU.md).
function(lopt_cuda_code nvcc architectures result)
  execute_process(COMMAND ${nvcc} --list-gpu-code OUTPUT_VARIABLE known ERROR_QUIET)
  string(REGEX MATCHALL "sm_[0-9]+" known "${known}")
  set(asked "${architectures}")
  if(NOT asked)
    set(architectures ${LOPT_CUDA_ARCHITECTURES})
  endif()
  set(code)
  foreach(architecture IN LISTS architectures)
    if(architecture MATCHES "^([0-9]+)-real$")
      set(name sm_${CMAKE_MATCH_1})
      if(name IN_LIST known)
        list(APPEND code ${name})
      elseif(asked)
        message(FATAL_ERROR "CMAKE_CUDA_ARCHITECTURES holds ${architecture}, which ${nvcc} does not know: "
                            "take a newer CUDA, or leave it out (80-virtual serves newer GPUs, after a slow first start)")
      else()
        message(STATUS "CUDA kernels without ${name}, which ${nvcc} does not know")
      endif()
    elseif(architecture MATCHES "^[0-9]+-virtual$")
      list(APPEND code compute_80)
    else()
      message(FATAL_ERROR "CMAKE_CUDA_ARCHITECTURES holds \"${architecture}\": give numbers with -real (machine code) or "
                          "-virtual (PTX), such as 80-real;90-real, or native alone, with a GPU in this machine")
    endif()
  endforeach()
  list(REMOVE_DUPLICATES code)
  set(${result} "${code}" PARENT_SCOPE)
endfunction()

if(CMAKE_SCRIPT_MODE_FILE)
  lopt_nvcc_refusal("${NVCC}" refusal)
  if(refusal)
    message(FATAL_ERROR "${refusal}")
  endif()
  lopt_cuda_code("${NVCC}" "${ARCHITECTURES}" code)
  message(STATUS "code: ${code}")
endif()
